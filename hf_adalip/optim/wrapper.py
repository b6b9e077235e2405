"""`Lipschitz`: the same S on top of any optimizer."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Optimizer

from . import fused as fused_form
from .census import SCALARS, Census, Layer, Member, Options, State, as_scalar, real, store
from .groups import Layers, checked_params, name_layers, restore_structure, structure_of
from .kernels import KernelError
from .layerwise import Keys, LayerwiseOptimizer, apart, forget_predecessor
from .lipschitz import Estimator, is_number
from .names import by_name
from .norms import index_tensor, mixed_norms
from .rules import SGD, Batch, wide
from .shards import local, local_grad
from .signals import Gradients, Signal, Updates

_OURS = "lipschitz."
"""Marks a key of ours in a state_dict where the base has one of the same name."""


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
        nonfinite: what a layer does whose gradient norm is not finite. "skip" hides the layer's
            gradients from the base for the step, and S stays, as at the layer's next step, too;
            "raise" stops before anything has changed. Both look at one flag per layer on the
            host; "propagate" looks at nothing.
        fused: measure and scale in the compiled form, as the six optimizers do (see
            `LipOptimizer`); how the base steps is for it to say. For signal="gradient". None
            takes it where they do.

    Raises:
        TypeError: if `optimizer` is not a torch.optim.Optimizer.
        ValueError: for a bad value, for an optimizer that has an S already, for LBFGS, for one
            that averages iterates (ASGD, schedule-free ones, which have train() and eval()), and
            for one without a learning rate.
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
        self._law = Estimator(gamma, c, scale_bounds, nonfinite)
        self._signal: Signal = Gradients() if signal == "gradient" else Updates()
        self._previous = previous or ("applied" if signal == "update" else None)
        self._layers = layers
        named: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            named.append(dict(group))
            name_layers(named, layers)
        for group, copy in zip(optimizer.param_groups, named, strict=True):
            group.update(structure_of(copy))
            self._remember_originals(group)
        self.optimizer = optimizer
        self.state: defaultdict[Tensor, State] = defaultdict(dict)
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

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "_law", "_signal", "_previous", "_layers", "_fused")
        return {name: self.__dict__[name] for name in names} | {"state": self._state_apart()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values of the constructor's arguments, without optimizer, layers and fused."""
        signal = "gradient" if isinstance(self._signal, Gradients) else "update"
        return {**asdict(self._law), "signal": signal, "previous": self._previous}

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
                own = {_OURS * (n in based) + n: x for n, x in apart(self.state[param]).items()}
                state[key] = {**based, **own}
        packed = {**packed, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; S and norms come back bit for bit."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        state_dict = by_name(state_dict, self.param_groups)
        structure = [structure_of(group) for group in self.param_groups]
        own: dict[Any, State] = {}
        based: dict[Any, Any] = {}
        params = set(_ids(state_dict))
        for key, saved in state_dict["state"].items():
            if key in params:
                own[key], based[key] = self._split(saved)
                if own[key] and not based[key]:
                    del based[key]
            else:  # of the base as a whole
                based[key] = saved
        self._check_loaded({**state_dict, "state": own})
        self.optimizer.load_state_dict({**state_dict, "state": based})
        for group, own_structure in zip(self.param_groups, structure, strict=True):
            restore_structure(group, own_structure)
        self.state = defaultdict(dict)
        for key, param in zip(_ids(state_dict), self._parameters(), strict=True):
            if mine := own.get(key):
                self._restore_numbers(param, mine)
                if self._history in mine:
                    history = mine[self._history].to(param.device, param.dtype)
                    self.state[param][self._history] = history
        self._complete_loaded()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _split(self, saved: State) -> tuple[State, State]:
        """A parameter's saved state: our part, and the base's."""
        own, based = {}, {}
        for name, value in saved.items():
            if name.startswith(_OURS):
                own[name.removeprefix(_OURS)] = value
            elif name in {*SCALARS, self._history} - {"step"} and _OURS + name not in saved:
                own[name] = value
            else:
                based[name] = value
        return own, based

    def _parameters(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _history(self) -> str:
        return "prev_grad" if isinstance(self._signal, Gradients) else "prev_update"

    def _options(self, group: dict[str, Any]) -> Options:
        return self._law, self._previous

    def _check(self, member: Member) -> None:
        super()._check(member)
        dtype = member.param.dtype
        if self._signal.measures_updates and dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f'signal="update" needs float32 parameters, got {dtype}: the base rounds its '
                "update into the parameter, and S would be estimated from what is left of it; use "
                "AdaLipU, RMSLipU or AdamLipU"
            )

    def _state_keys(self, group: dict[str, Any]) -> Keys:
        return Keys((), (self._history,), ())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the base optimizer, scaled by S.

        Args:
            closure: evaluates the model again and returns the loss; called once.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: for sparse gradients, and with nonfinite="raise" for a gradient norm
                that is not finite; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        census = self._survey()
        self._count_step(self._step(census))
        self._remember(census)
        return loss

    def _step(self, census: Census) -> Tensor:
        """Returns which layers live."""
        layers = census.layers
        by_gradient = isinstance(self._signal, Gradients)
        members = [m for layer in layers for m in layer.members]
        silent = [m for layer in layers for m in layer.absent]
        order = [(i, m) for i, layer in enumerate(layers) for m in layer.members]
        order += [(i, m) for i, layer in enumerate(layers) for m in layer.absent]
        census.arrange(order)
        home = self._home()
        params = [real(local(m.param)) for m in members]
        grads = [real(local_grad(m.param, m.grad)) for m in members if m.grad is not None]
        before = [_previous(m, self._history) for m in (*members, *silent)]
        compiled = self._compiled(params, grads)

        def signal_norms(now: list[Tensor]) -> tuple[Tensor, Tensor]:
            """‖x_t‖ and ‖x_t - x_{t-1}‖ of the layers, and which live."""
            widest = reduce(torch.promote_types, (wide(x).dtype for x in before), torch.float32)
            norms = torch.zeros(len(before), 2, dtype=widest, device=home)
            for kind in compiled:
                rows = fused_form.measure(_batch(kind, members, params, now, before))
                norms[index_tensor(tuple(kind), home)] = rows[:, ::2].to(norms)
            rest = sorted(set(range(len(before))).difference(*compiled))
            if rest:
                others = [wide(before[i]) for i in rest]
                signals = [wide(now[i]) for i in rest if i < len(now)]
                signals += [torch.zeros_like(x) for x in others[len(signals) :]]
                changes = [x - y for x, y in zip(signals, others, strict=True)]
                columns = [mixed_norms(x, home).to(norms) for x in (signals, changes)]
                norms[index_tensor(tuple(rest), home)] = torch.stack(columns, dim=1)
            return self._layer_norms(norms, census)

        if by_gradient:
            norms, live = signal_norms(grads)
            grad_norms = norms[:, :1]
        elif self._law.nonfinite == "propagate":
            grad_norms = torch.zeros(len(layers), 1, device=home)
            live = torch.ones(len(layers), dtype=torch.bool, device=home)
        else:
            size = mixed_norms(grads, home)
            size = torch.cat([size, size.new_zeros(len(silent))])
            grad_norms, live = self._layer_norms(size[:, None], census)
        finite, moved = self._movable(layers, self._finite(census, grad_norms))

        old = [p.clone() for p in params]
        if by_gradient:  # now, as a base may compute with the gradients in their place
            here = [i for i, moves in enumerate(moved) if moves]
            if here:
                torch._foreach_copy_([before[i] for i in here], [grads[i] for i in here])
        try:
            self._base_step(members, moved)
        except BaseException:
            if by_gradient:  # S has not followed
                forget_predecessor([m.state for m in census.members])
            raise
        updates: list[Tensor] = []
        if not by_gradient:
            updates = [wide(p) - wide(q) for p, q in zip(params, old, strict=True)]
            norms, proposed = signal_norms(updates)
            live = live & proposed
            finite = finite & norms[:, 0].isfinite()
        if not layers:  # other ranks may have gradients; this one took part in the norms
            return live
        self._keep(census)
        factor, go = map(census.spread, self._follow(census, norms, finite, live))
        goes = go.unbind()
        for kind in compiled:
            here = [i for i in kind if moved[i]]
            if here:
                index, device = index_tensor(tuple(here), home), params[here[0]].device
                weights, may = factor[index].to(device), go[index].to(device)
                fused_form.blend([params[i] for i in here], [old[i] for i in here], weights, may)
        for i in sorted(set(range(len(members))).difference(*compiled)):
            if moved[i]:
                _scale(params[i], old[i], factor[i], goes[i])
        for i, update in enumerate(updates):
            if moved[i]:
                scale = factor[i].to(update)
                remembered = self._signal.remembered(update, scale, self._previous)
                before[i].copy_(_unless_skipped(goes[i], remembered, before[i]))
        for x, ok in zip(before[len(members) :], goes[len(members) :], strict=True):
            x.copy_(_unless_skipped(ok, torch.zeros_like(x), x))
        self._keep_rates(members, factor, moved, go)
        return live

    def _compiled(self, params: list[Tensor], grads: list[Tensor]) -> list[list[int]]:
        """Which parameters are measured and scaled in the fused form, those of a kind together."""
        wanted = self._fused
        if wanted is None and all(p.device.type == "cpu" for p in params):
            wanted = fused_form.pays(sum(p.numel() for p in params))
        kinds: dict[Any, list[int]] = {}
        if wanted and isinstance(self._signal, Gradients) and not torch.compiler.is_compiling():
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if fused_form.fits(param, grad):
                    kinds.setdefault((param.device, param.dtype), []).append(i)
        return [here for kind, here in kinds.items() if self._compiles(*kind)]

    def _compiles(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there are kernels, which is found out before the base has stepped."""
        try:
            fused_form.compile_for(device, dtype)
        except KernelError:
            if self._fused:
                raise
            return False
        return True

    def _movable(self, layers: list[Layer], finite: Tensor) -> tuple[Tensor, list[bool]]:
        """Whose gradients the base is to see.

        Returns:
            which layers are finite and, as the base steps a flat tensor as one, share none with
            one that is not; and the same for each of their members.
        """
        if self._law.nonfinite != "skip":
            return finite, [True for layer in layers for _ in layer.members]
        fine = finite.tolist()
        bad = {
            id(m.tensor)
            for layer, ok in zip(layers, fine, strict=True)
            for m in layer.members
            if not ok
        }
        if bad:
            fine = [all(id(m.tensor) not in bad for m in layer.members) for layer in layers]
            finite = index_tensor(tuple(map(int, fine)), finite.device) > 0
        return finite, [ok for layer, ok in zip(layers, fine, strict=True) for _ in layer.members]

    def _base_step(self, members: list[Member], moved: list[bool]) -> None:
        """Steps the base, from which the gradients of the others are hidden."""
        hidden = {m.tensor: m.tensor.grad for m, ok in zip(members, moved, strict=True) if not ok}
        for tensor in hidden:
            tensor.grad = None
        try:
            self.optimizer.step()
        finally:
            for tensor, grad in hidden.items():
                tensor.grad = grad

    def _keep_rates(
        self, members: list[Member], factor: Tensor, moved: list[bool], go: Tensor
    ) -> None:
        for group in self.param_groups:
            here = tuple(i for i, m in enumerate(members) if m.group is group and moved[i])
            if here:
                lr = group["lr"]
                lr = as_scalar(lr, factor.device) if isinstance(lr, Tensor) else lr
                index = index_tensor(here, factor.device)
                targets = [members[i].state["layer_lr"] for i in here]
                before = torch.stack([x.to(factor.device) for x in targets])
                store(targets, _unless_skipped(go[index], factor[index] * lr, before))


def _ids(state_dict: dict[str, Any]) -> Iterator[Any]:
    """What a state_dict calls the parameters, in the order of the groups."""
    return itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])


def _scale(param: Tensor, old: Tensor, factor: Tensor, ok: Tensor) -> None:
    """Makes p_old + S·û of what the base has stepped to."""
    applied = torch.lerp(wide(old), wide(param), factor.to(param.device, wide(param).dtype))
    # The base has not stepped a layer whose gradient is not finite; this is for an update that is
    # not finite although the gradient is.
    param.copy_(_unless_skipped(ok, applied, wide(old)))


def _unless_skipped(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(ok.to(old.device), new.to(old.dtype), old)


def _previous(member: Member, history: str) -> Tensor:
    """x_{t-1} of this rank's shard."""
    x: Tensor = real(local(member.state[history]))
    return x


_NO_OPTIONS = {
    "momentum": 0.0,
    "nesterov": False,
    "maximize": False,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
}


def _batch(
    kind: list[int],
    members: list[Member],
    params: list[Tensor],
    grads: list[Tensor],
    before: list[Tensor],
) -> Batch:
    """Members whose gradients are to be measured."""
    return Batch(
        rule=SGD(),
        signal=Gradients(),
        group=_NO_OPTIONS,
        members=[members[i] for i in kind],
        params=[params[i] for i in kind],
        grads=[grads[i] for i in kind],
        states=[{"prev_grad": before[i]} for i in kind],
        steps=torch.zeros(len(kind), device=params[kind[0]].device),
        lr=0.0,
    )
