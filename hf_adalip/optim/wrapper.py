"""`Lipschitz`: the same S on top of any optimizer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Optimizer

from .batch import Batch, LayerOptions, LocalParam
from .estimator import Estimator, is_number
from .forms import foreach
from .forms import fused as fused_form
from .forms.kernels import KernelError
from .groups import (
    Layers,
    checked_params,
    decays_of,
    group_index,
    name_layers,
    refuse_options,
    restore_structure,
    structure_of,
)
from .history import real
from .loading import (
    check_base_group,
    check_base_state,
    check_form,
    check_numbers,
    is_torchs,
    refuse_unless_dict,
    restore_scalars,
    unchanged_if_refused,
)
from .names import by_name
from .plan import StepPlan, as_scalar
from .rules import SGD
from .sharding import FlatTensors
from .signals import Gradients, Signal, Updates, elements, index_tensor, norms
from .state import (
    SCALARS,
    State,
    StateKeys,
    complete_loaded,
    forget_predecessor,
    unpacked,
)
from .step import Form, LayerwiseOptimizer, raise_unless, to_opmath

_OURS = "lipschitz."
"""Marks a key of ours in a state_dict where the base has one of the same name."""

_ENTRIES = "lipschitz.entries"
"""Key in a state_dict that lists the entries of our own `state` that belong to no parameter; other
such entries are the base's."""


_OF_ALL_GROUPS = ("gamma", "c", "signal", "previous", "scale_bounds", "nonfinite")
"""Arguments that no parameter group has its own value of."""


class Lipschitz(LayerwiseOptimizer):
    """A Lipschitz-adaptive learning rate per layer on top of any torch.optim.Optimizer.

        base proposes û_t = p_new - p_old at its own learning rate;   p = p_old + S_t·û_t

    S_t follows the gradients (`signal="gradient"`, Eqs. 6-9) or the updates ("update",
    Appendix C). It scales the whole step that the base optimizer takes, its own weight decay
    included. `Lipschitz(torch.optim.Adam(...))` agrees with AdamLip to rounding for float32
    parameters, at the price of a copy of them during the step. In bf16 the base rounds its step
    into the parameter before S can scale it: there AdamLip and its kin are the better choice.

    It is a torch.optim.Optimizer itself and has the base's param_groups; schedulers, GradScaler,
    accelerate and Trainer take it. `state` has its own part of the state, `state_dict()` both.

    Args:
        optimizer: the base optimizer; step it only through this one.
        gamma: γ, coefficient of the moving average, in (0, 1).
        c: positive constant of Eq. 7, or "theoretical" for Eq. A.3.
        layers: "tensor", "module" (needs a base made with named parameters), or a function
            from a parameter's name to its layer's name.
        signal: "gradient" or "update".
        previous: with signal="update", the predecessor as "applied" (S included; the default)
            or as "proposed".
        scale_bounds: (low, high) that S is kept in; None for no bounds.
        nonfinite: what a layer does whose gradient norm, or its square, is not finite (from 1.8e19
            on; for float64 parameters, from 3.4e38 on). "skip" hides the layer's gradients from
            the base for the step, and S stays, as at the layer's next step, too; "raise" stops
            before anything has changed. Both look at one flag per layer on the host; "propagate"
            looks at nothing.
        fused: measure and scale in the compiled form, as AdamLip and the others do (see
            `LipOptimizer`); how the base steps is for it to say. For signal="gradient". None
            takes it where they do.

    Raises:
        TypeError: if `optimizer` is not a torch.optim.Optimizer.
        ValueError: for a bad value, for an optimizer that has an S already, for LBFGS, for one
            that averages iterates (ASGD, schedule-free ones, which have train() and eval()), and
            for one without a learning rate.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = Lipschitz(torch.optim.SGD(model.parameters(), lr=0.05))
        >>> for x in ([1.0, 2.0], [2.0, 1.0]):
        ...     loss = model(torch.tensor(x)).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [round(rate.scale, 3) for rate in optimizer.layer_learning_rates().values()]
        [0.956]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gamma: float = 0.8,
        c: float | Literal["theoretical"] = 1e-8,
        layers: Layers = "tensor",
        *,
        signal: Literal["gradient", "update"] = "gradient",
        previous: Literal["applied", "proposed"] | None = None,
        scale_bounds: tuple[float, float] | None = (0.1, 10.0),
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        fused: bool | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer instance, got {optimizer!r}"
            )
        if isinstance(optimizer, LayerwiseOptimizer):
            raise ValueError(
                f"{type(optimizer).__name__} has an S per layer already; wrap a base optimizer"
            )
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates several gradients in a step, while S needs one gradient a step"
            )
        if isinstance(optimizer, ASGD) or all(hasattr(optimizer, x) for x in ("train", "eval")):
            raise ValueError(
                f"{type(optimizer).__name__} keeps iterates of its own beside the parameters, "
                "which would take the step that S has not scaled; choose another base"
            )
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if not isinstance(lr, Tensor) and not is_number(lr):
                raise ValueError(
                    f"{type(optimizer).__name__} has a group with lr={lr!r}, and S scales a "
                    "learning rate: give it a number (Adafactor of transformers: with "
                    "relative_step=False, too)"
                )
        if signal not in ("gradient", "update"):
            raise ValueError(f'signal must be "gradient" or "update", got {signal!r}')
        if previous not in (None, "applied", "proposed"):
            raise ValueError(f'previous must be "applied" or "proposed", got {previous!r}')
        if previous is not None and signal == "gradient":
            raise ValueError(f'previous={previous!r} needs signal="update"')
        if fused not in (None, True, False):
            raise ValueError(f"fused must be None, True or False, got {fused!r}")
        if fused and signal == "update":
            raise ValueError('fused=True needs signal="gradient"')
        for group in optimizer.param_groups if fused else ():
            fused_form.refuse_unless_possible(group["params"])
        self._fused = fused
        self._estimator = Estimator(gamma, c, scale_bounds, nonfinite)
        self.signal: Signal = Gradients() if signal == "gradient" else Updates()
        self._previous = previous or ("applied" if signal == "update" else None)
        self._layers = layers
        self._flat_tensors = FlatTensors()
        named: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            refuse_options(group, _OF_ALL_GROUPS, "Lipschitz", optimizer)
            named.append(dict(group))
            name_layers(named, named[-1].pop("layers", layers))
        for group, copy in zip(optimizer.param_groups, named, strict=True):
            group.pop("layers", None)
            group.update(structure_of(copy))
            self._flat_tensors.note(group, decays_of(group))
        self.optimizer = optimizer
        self.state: defaultdict[Any, State] = defaultdict(dict)
        # What torch does to make an optimizer of a dict: hooks, and the profiled step.
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    @property
    def _c(self) -> float | str:  # type: ignore[override]
        return self._estimator.c

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "_estimator", "signal", "_previous", "_layers", "_fused")
        return {name: self.__dict__[name] for name in names} | {"state": self._separate_state()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values of the constructor's arguments, without optimizer, layers and fused."""
        signal = "gradient" if isinstance(self.signal, Gradients) else "update"
        return {**self._estimator.hyperparameters, "signal": signal, "previous": self._previous}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters.items())
        return f"Lipschitz({shown}, {self.optimizer!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's, with `layers` for the group; if it is refused, nothing is added."""
        group = {key: value for key, value in param_group.items() if key != "layers"}
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = checked_params(group["params"])
        if self._fused:
            fused_form.refuse_unless_possible(group["params"])
        refuse_options(group, _OF_ALL_GROUPS, "Lipschitz", self.optimizer)
        self.optimizer.add_param_group(group)
        self._name_last_group(param_group.get("layers", self._layers))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with S, norms and history beside the base's own state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = self.optimizer.state_dict()
        state = dict(packed["state"])
        for key, param in zip(_ids(packed), self._parameters(), strict=True):
            if param in self.state:
                based = state.get(key, {})
                # what others keep here, as timm's Lookahead, is marked as what the base has too
                plain = self._own_keys - based.keys()
                own = {
                    _OURS * (n not in plain) + n: x for n, x in unpacked(self.state[param]).items()
                }
                state[key] = {**based, **own}
        entries: dict[Any, Any] = {}
        for key, value in self.state.items():
            if not isinstance(key, Tensor):
                name = f"{_OURS}{key}" if key in state else key
                entries[name], state[name] = key, value
        if entries:
            state[_ENTRIES] = entries
        packed = {**packed, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; S and norms come back bit for bit.

        Raises:
            TypeError: for what is no dict.
            ValueError: for the state of other parameters, and for a value that no option or state
                can have, in the base's part as far as the base says. Nothing has been changed then.
        """
        refuse_unless_dict(state_dict)
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_form(state_dict)
        state_dict = by_name(state_dict, self.param_groups)
        structure = [structure_of(group) for group in self.param_groups]
        own: dict[Any, State] = {}
        based: dict[Any, Any] = {}
        entries = state_dict["state"].get(_ENTRIES, {})
        others: dict[Any, Any] = {}
        params = set(_ids(state_dict))
        for key, saved in state_dict["state"].items():
            if key in params:
                own[key], based[key] = self._split(saved)
                if own[key] and not based[key]:
                    del based[key]
            elif key in entries:  # of this optimizer as a whole
                others[entries[key]] = saved
            elif key != _ENTRIES:  # of the base as a whole
                based[key] = saved
        self._check_loaded({**state_dict, "state": own})
        self._check_base({**state_dict, "state": based})
        with unchanged_if_refused(self, self.optimizer):
            self.optimizer.load_state_dict({**state_dict, "state": based})
            for group, own_structure in zip(self.param_groups, structure, strict=True):
                restore_structure(group, own_structure)
            self.state = defaultdict(dict, others)
            own_keys = self._own_keys
            for key, param in zip(_ids(state_dict), self._parameters(), strict=True):
                if mine := own.get(key):
                    of_others = {name: x for name, x in mine.items() if name not in own_keys}
                    self.state[param].update(of_others)
                    restore_scalars(self, param, mine)
                    if self._history in mine:
                        history = mine[self._history].to(param.device, param.dtype)
                        self.state[param][self._history] = history
            complete_loaded(self)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _check_base(self, state_dict: dict[str, Any]) -> None:
        steps = []
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            check_base_group(self.optimizer, group, saved)
            for param, key in zip(group["params"], saved["params"], strict=False):
                state = state_dict["state"].get(key, {})
                check_base_state(self.optimizer, key, param, state)
                if is_torchs(self.optimizer) and "step" in state:
                    steps.append((key, {"step": state["step"]}, False))
        check_numbers(steps)

    def _split(self, saved: State) -> tuple[State, State]:
        """A parameter's saved state: our part, and the base's."""
        own, based = {}, {}
        own_keys = self._own_keys
        for name, value in saved.items():
            if name.startswith(_OURS):
                own[name.removeprefix(_OURS)] = value
            elif name in own_keys and _OURS + name not in saved:
                own[name] = value
            else:
                based[name] = value
        return own, based

    def _parameters(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _history(self) -> str:
        return "prev_grad" if isinstance(self.signal, Gradients) else "prev_update"

    @property
    def _own_keys(self) -> set[str]:
        """What is ours in the state of a parameter."""
        return {*SCALARS, self._history} - {"step"}

    def _layer_options(self, group: dict[str, Any]) -> LayerOptions:
        return LayerOptions(self._estimator, self._previous)

    def _state_keys(self, group: dict[str, Any]) -> StateKeys:
        return StateKeys((), (self._history,), ())

    def _check(self, param: LocalParam) -> None:
        super()._check(param)
        dtype = param.param.dtype
        if self.signal.of_updates and dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f'signal="update" needs float32 parameters, got {dtype}: the base rounds its '
                "update into the parameter, and S would be estimated from what is left of it; use "
                "AdaLipU, RMSLipU or AdamLipU"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the base optimizer, scaled by S.

        Args:
            closure: evaluates the model again and returns the loss; called once.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: for sparse gradients, and with nonfinite="raise" for a gradient norm
                that is not finite; nothing has been changed then. With signal="update" also for
                an update that is not: parameters are as before then, but the base's state has
                taken the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    # The parts of a step

    def _buckets(self, plan: StepPlan) -> list[tuple[Form | None, list[tuple[int, LocalParam]]]]:
        """Tensors of one group, device and dtype are measured together; the base steps all."""
        alike: dict[Any, list[tuple[int, LocalParam]]] = {}
        forms = {"foreach": foreach, "fused": fused_form, "absent": None}
        fuses = self._fuses(plan)
        for i, layer in enumerate(plan.layers):
            for param in layer.params:
                kind = (group_index(param.group), param.param.device, param.param.dtype)
                fused = fuses and fused_form.takes(param) and self._compiles(*kind[1:])
                alike.setdefault(("fused" if fused else "foreach", *kind), []).append((i, param))
        for i, layer in enumerate(plan.layers):
            for param in layer.absent:
                kind = (group_index(param.group), param.param.device, param.param.dtype)
                alike.setdefault(("absent", *kind), []).append((i, param))
        return [(forms[key[0]], params) for key, params in alike.items()]

    def _fuses(self, plan: StepPlan) -> bool:
        """Whether the fused form is wanted."""
        wanted = self._fused
        params = [p.param for layer in plan.layers for p in layer.params]
        if wanted is None and all(p.device.type == "cpu" for p in params):
            wanted = fused_form.pays(sum(p.numel() for p in params))
        if self._fused:
            fused_form.refuse_unless_possible(params, stepped=True)
        return bool(wanted) and not self.signal.of_updates and not torch.compiler.is_compiling()

    def _batches(self, plan: StepPlan) -> list[Batch]:
        """Gradients and their history, to be measured as plain SGD's are."""
        batches = []
        for bucket in plan.buckets:
            local_params = bucket.params
            grads = [p.shard.local_grad(p.grad) for p in local_params if p.grad is not None]
            batches.append(
                Batch(
                    rule=SGD(),
                    signal=Gradients(),
                    group=_NO_OPTIONS,
                    local_params=local_params,
                    params=[real(p.shard.local(p.param)) for p in local_params],
                    grads=[real(grad) for grad in grads] if bucket.form else [],
                    states=[
                        {"prev_grad": real(p.shard.local(p.state[self._history]))}
                        for p in local_params
                    ],
                    steps=torch.zeros(len(local_params), device=local_params[0].param.device),
                    lr=0.0,
                    moment_keys=(),
                    history_keys=("prev_grad",),
                )
            )
        return batches

    def _measure(self, plan: StepPlan, batches: list[Batch]) -> list[Tensor]:
        if not self.signal.of_updates:
            return super()._measure(plan, batches)
        sizes = [
            norms(batch.grads) if batch.grads else torch.zeros(len(batch.params)).to(batch.steps)
            for batch in batches
        ]
        finite = torch.ones(len(plan.layers), dtype=torch.bool)
        if self._estimator.nonfinite != "propagate":
            grads = torch.cat([x.to(plan.device) for x in sizes])
            finite = self._finite(plan, plan.layer_norms(grads[:, None])[0])
        self._base_step(plan, batches, finite)
        rows = super()._measure(
            plan, [replace(b, grads=_updates(b), prepared=None) for b in batches]
        )
        if self._estimator.nonfinite != "propagate":
            for row, size in zip(rows, sizes, strict=True):
                row[:, 0] = size
        if plan.raises:
            self._undo_unless_finite(plan, batches, rows)
        return rows

    def _undo_unless_finite(self, plan: StepPlan, batches: list[Batch], rows: list[Tensor]) -> None:
        """Puts the parameters back before an update that is not finite is raised."""
        updates = torch.cat([row[:, 1:2].to(plan.device) for row in rows])
        finite = (plan.layer_norms(updates)[0] < math.inf).all(dim=1)
        if not finite.all():
            for batch in batches:
                if batch.grads:
                    torch._foreach_copy_(batch.params, batch.prepared)
        raise_unless(finite, plan, "the parameters are as before, the base's state is not")

    def _finite(self, plan: StepPlan, norms: Tensor) -> Tensor:
        """Nor those that share a flat tensor, which the base steps as one, with a layer that is
        not finite."""
        finite = super()._finite(plan, norms)
        if self._estimator.nonfinite != "skip" or not any(p.parts for p in plan.params):
            return finite
        fine = finite.tolist()
        bad = {id(p.tensor) for i, p in zip(plan.owner, plan.params, strict=True) if not fine[i]}
        good = (all(id(p.tensor) not in bad for p in layer.params) for layer in plan.layers)
        return finite & (index_tensor(tuple(map(int, good)), finite.device) > 0)

    def _visible(self, plan: StepPlan, finite: Tensor) -> list[bool]:
        """Which parameters' gradients the base is to see."""
        if self._estimator.nonfinite != "skip" or not plan.layers:
            return [True] * len(plan.params)
        # Tensor subclasses have no tolist().
        fine = finite.tolist() if type(finite) is Tensor else [bool(x) for x in finite]
        return [fine[i] for i in plan.owner]

    def _base_step(self, plan: StepPlan, batches: list[Batch], finite: Tensor) -> None:
        """Steps the base, from which gradients that are not finite are hidden, and keeps what the
        parameters were before."""
        visible = self._visible(plan, finite)
        if not self.signal.of_updates:
            self._keep_gradients(plan, batches, visible)
        for batch in batches:
            if batch.grads:
                batch.prepared = [p.clone() for p in batch.params]
        hidden = {
            p.tensor: p.tensor.grad for p, ok in zip(plan.params, visible, strict=True) if not ok
        }
        for tensor in hidden:
            tensor.grad = None
        try:
            self.optimizer.step()
        finally:
            for tensor, grad in hidden.items():
                tensor.grad = grad

    def _advance(
        self,
        plan: StepPlan,
        batches: list[Batch],
        factor: Tensor,
        stepped: Tensor,
        finite: Tensor,
    ) -> None:
        if not self.signal.of_updates:
            try:
                self._base_step(plan, batches, finite)
            except BaseException:  # S was not updated
                forget_predecessor([p.state for p in plan.params])
                raise
        for bucket, batch in zip(plan.buckets, batches, strict=True):
            here, device = bucket.where, batch.params[0].device
            scale, own = factor[here].to(device), stepped[here].to(device)
            history = [state["prev_grad"] for state in batch.states]
            flags = {"differentiable": False, "capturable": self._is_capturable}
            scales, are_stepped = elements(scale, flags), elements(own, flags)
            if bucket.form is None:
                for x, is_stepped in zip(history, are_stepped, strict=True):
                    x.copy_(_unless_skipped(is_stepped, torch.zeros_like(x), x))
                continue
            if self.signal.of_updates:
                for i, (x, update) in enumerate(zip(history, _updates(batch), strict=True)):
                    new = update * scales[i] if self._previous == "applied" else update
                    x.copy_(_unless_skipped(are_stepped[i], new, x))
            old = batch.prepared
            if bucket.form is fused_form:
                fused_form.blend(batch.params, old, scale, own)
            else:
                for i, param in enumerate(batch.params):
                    _scale(param, old[i], scales[i], are_stepped[i])
            lr = bucket.params[0].group["lr"]
            rates = scale * (as_scalar(lr, device) if isinstance(lr, Tensor) else lr)
            before = plan.read("layer_lr", here, device)
            plan.write("layer_lr", _unless_skipped(own, rates, before), here)

    @property
    def _is_capturable(self) -> bool:
        return any(group.get("capturable", False) for group in self.param_groups)

    def _keep_gradients(self, plan: StepPlan, batches: list[Batch], visible: list[bool]) -> None:
        """Before the base steps, as it may compute with the gradients in their place."""
        for bucket, batch in zip(plan.buckets, batches, strict=True):
            seen = [i for i, ok in enumerate(visible[bucket.where]) if ok and batch.grads]
            if seen:
                torch._foreach_copy_(
                    [batch.states[i]["prev_grad"] for i in seen], [batch.grads[i] for i in seen]
                )

    def _compiles(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there are kernels, which is found out before the base has stepped."""
        try:
            fused_form.compile_for(device, dtype)
        except KernelError as error:
            if self._fused:
                raise
            fused_form.forgo(error)
            return False
        return True


def _ids(state_dict: dict[str, Any]) -> Iterator[Any]:
    """What a state_dict calls the parameters, in the order of the groups."""
    return itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])


def _scale(param: Tensor, old: Tensor, factor: Tensor | float, stepped: Tensor | bool) -> None:
    """Makes p_old + S·û of what the base has stepped to."""
    before, after = to_opmath(old), to_opmath(param)
    if isinstance(factor, Tensor):
        factor = factor.to(after.dtype)
    # The base has not stepped a layer whose gradient is not finite; what is skipped here as well
    # is an update that is not finite although the gradient is.
    param.copy_(_unless_skipped(stepped, torch.lerp(before, after, factor), before))


def _unless_skipped(stepped: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    if not isinstance(stepped, Tensor):
        return new if stepped else old
    return torch.where(stepped, new.to(old.dtype), old)


def _updates(batch: Batch) -> list[Tensor]:
    """û_t, which the base has taken, in their opmath dtype."""
    if not batch.grads:
        return []
    pairs = zip(batch.params, batch.prepared, strict=True)
    return [to_opmath(p) - to_opmath(old) for p, old in pairs]


_NO_OPTIONS: dict[str, Any] = {
    "differentiable": False,
    "momentum": 0.0,
    "nesterov": False,
    "maximize": False,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
}
