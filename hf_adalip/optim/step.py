"""One step of an optimizer with an S per layer: measure → follow → advance.

    measure   ‖g_t‖, ‖x_t‖ and ‖x_t - x_{t-1}‖ of every parameter, and from them of every layer
    follow    S of every layer (estimator.py)
    advance   moments, parameters and history, with A_t = α_t·S_t

`step_layers` is the one driver, for every `LipOptimizer` and for `Lipschitz`. `measure` and
`advance` here are the loop form, which reads as the paper's algorithms do and is the truth that
the faster forms in forms/ are tested against; this module itself is that `Form`.

Moments, history, `step` and `layer_lr` belong to a parameter, and `_advance` writes them. S,
`prev_norm`, `nonfinite_steps` and c belong to a layer, of which each parameter keeps a copy, and
`step_layers` writes those. Arithmetic is done in at least float32 and rounded once, when a result
is stored in the parameter's dtype.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype, _use_grad_for_differentiable

from .batch import Batch, Bucket, LayerOptions, LocalParam
from .collect import local_params, make_plan, refuse_unsuitable
from .estimator import LayerState
from .groups import Layers, decays_of, name_layers
from .history import real, sketch
from .loading import check_loaded
from .plan import StepPlan, as_scalar, has_rate, home_device
from .rounding import drawn, rounded
from .rules import Group, Moments, Numbers, Rule
from .sharding import FlatTensors, Shard
from .signals import OPMATH, Signal, elements, norm
from .state import State, StateKeys, unpacked

if TYPE_CHECKING:
    from .release import GradientRelease


class Form(Protocol):
    """A way of computing a step: the loop form below, forms/foreach.py and forms/fused.py."""

    __name__: str

    def measure(self, batch: Batch) -> Tensor:
        """As `measure` below. Of a batch that is not stoppable, it may write the history."""

    def advance(self, batch: Batch, rates: Tensor, history_rates: Tensor, stepped: Tensor) -> None:
        """As `advance` below."""


class LayerRate(NamedTuple):
    """A layer's learning rate at its last step."""

    scale: float  # S_t
    lr: float  # A_t as applied: α_t·S_t, or α_t on the layer's first step
    # ‖x_t‖ of the gradient, or in the -U forms of the update; 0 after a step that was skipped
    norm: float
    nonfinite_steps: int  # steps with a norm that was not finite; left out with nonfinite="skip"


class LayerwiseOptimizer(Optimizer):
    """An optimizer whose parameters belong to layers that have an S each.

    A parameter group names the layer of each of its parameters in "layer_names".
    """

    rule: Rule
    signal: Signal
    _layers: Layers
    _flat_tensors: FlatTensors
    _plan: StepPlan
    _release: GradientRelease | None = None  # steps parameters within backward
    _c: float | str | None = None  # c where groups have none of their own
    _plan_options: tuple[str, ...] = ()
    """The options of a group that decide how its parameters are stepped together."""

    @property
    def layers(self) -> str:
        """What shares one S: "tensor", "module", or the name of a function."""
        if isinstance(self._layers, str):
            return self._layers
        return getattr(self._layers, "__qualname__", repr(self._layers))

    @property
    def releases_gradients(self) -> bool:
        """Whether parameters are stepped within backward (`release_gradients`)."""
        return self._release is not None

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step (Algorithms 2-5).

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: for sparse gradients, and with nonfinite="raise" for a gradient norm
                that is not finite. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    def _take_step(self) -> None:
        """A step, with the plan of the step before if that still holds."""
        active = self._release.finish() if self._release else []
        kept: StepPlan | None = self.__dict__.get("_plan")
        is_new = torch.compiler.is_compiling() or kept is None or not kept.is_current(self)
        if kept is None or is_new:  # the first is for the type checker
            self.__dict__.pop("_plan", None)
            plan = make_plan(self)
        else:
            plan = kept
        if plan.device.type != "cpu":
            _check_capture(self)
        active.append(step_layers(self, plan))
        if any(group.get("c", self._c) == "theoretical" for group in self.param_groups):
            _count_step(self, active)
        if is_new and plan.is_reusable:
            plan.note(self)
            self._plan = plan

    # What each optimizer defines

    def _layer_options(self, group: dict[str, Any]) -> LayerOptions:
        """How S of the group's layers is estimated."""
        raise NotImplementedError

    def _state_keys(self, group: dict[str, Any]) -> StateKeys:
        """What the parameters of the group keep."""
        raise NotImplementedError

    def _buckets(self, plan: StepPlan) -> list[tuple[Form | None, list[tuple[int, LocalParam]]]]:
        """The parameters of the plan's layers, grouped by what is stepped together."""
        raise NotImplementedError

    def _check(self, param: LocalParam) -> None:
        """Refuses a parameter that it cannot step."""
        refuse_unsuitable(self, param)

    def _batches(self, plan: StepPlan) -> list[Batch]:
        """The tensors of each bucket, as they are now."""
        batches = []
        for bucket in plan.buckets:
            local_params, group = bucket.params, bucket.params[0].group
            device = local_params[0].param.device
            params = [p.param for p in local_params]
            states = [p.tensor_state if p.part is None else p.state for p in local_params]
            given: Any = (params if bucket.is_plain else local_params) if bucket.form else ()
            found = [x.grad for x in given]
            grads = [grad for grad in found if grad is not None]
            if not bucket.is_plain:
                shards = [p.shard for p in local_params]
                if bucket.form:
                    grads = [real(s.local_grad(g)) for s, g in zip(shards, grads, strict=True)]
                params = [real(s.local(p)) for s, p in zip(shards, params, strict=True)]
                states = [
                    {name: real(s.local(x)) for name, x in state.items()}
                    for s, state in zip(shards, states, strict=True)
                ]
            steps, lr = plan.read("step", bucket.where, device), group["lr"]
            batches.append(
                Batch(
                    rule=self.rule,
                    signal=self.signal,
                    group=group if local_params[0].decays else group | {"weight_decay": 0.0},
                    local_params=local_params,
                    params=params,
                    grads=grads,
                    states=states,
                    steps=steps + 1 if bucket.form else steps,
                    lr=as_scalar(lr, device) if isinstance(lr, Tensor) else lr,
                    moment_keys=bucket.moment_keys,
                    history_keys=bucket.history_keys,
                    sketch=bucket.sketch,
                    draws=bucket.draws,
                    stoppable=plan.raises or bool(plan.sharded),  # a collective may fail
                    memo=bucket.memo if bucket.is_plain else {},  # a shard's memory may move
                )
            )
        return batches

    def _prepare(self, bucket: Bucket, batch: Batch) -> None:
        """Does what a form may fail in, before anything is changed."""

    def _measure(self, plan: StepPlan, batches: list[Batch]) -> list[Tensor]:
        """`measure` of each batch. The fused form, which comes last, may write histories in it."""
        for bucket, batch in zip(plan.buckets, batches, strict=True):
            if hasattr(bucket.form, "prepare"):
                self._prepare(bucket, batch)
        return [
            bucket.form.measure(batch) if bucket.form else measure_absent(batch)
            for bucket, batch in zip(plan.buckets, batches, strict=True)
        ]

    def _finite(self, plan: StepPlan, norms: Tensor) -> Tensor:
        """Which layers have finite norms, shape [layers].

        Args:
            plan: of this step.
            norms: of gradients and signals, shape [layers, columns]; not ‖x_t - x_{t-1}‖, which may
                be infinite because x_{t-1} overflowed when it was stored.

        Raises:
            RuntimeError: with nonfinite="raise", naming the layers. Nothing has been changed.
        """
        finite = (norms < math.inf).all(dim=1)  # none is negative
        if plan.raises:
            raise_unless(finite, plan, "nothing was changed")
        return finite

    def _advance(
        self,
        plan: StepPlan,
        batches: list[Batch],
        factor: Tensor,
        stepped: Tensor,
        finite: Tensor,
    ) -> None:
        """`advance` of each batch, and the numbers of its state.

        Args:
            plan: of this step.
            batches: of the plan's buckets.
            factor: A_t/α_t of each parameter: S_t, or 1 at a layer's first step.
            stepped: which parameters take the step.
            finite: which layers have a finite gradient and signal.
        """
        for bucket, batch in zip(plan.buckets, batches, strict=True):
            here, device = bucket.where, batch.steps.device
            own = stepped[here].to(device)
            if bucket.form is None:
                advance_absent(batch, own)
                scalars = {"prev_lr": torch.zeros_like(batch.steps)} if bucket.recomputes else {}
            else:
                dtype = batch.params[0].dtype
                rates = batch.lr * factor[here].to(device, OPMATH.get(dtype, dtype))
                proposed = batch.group.get("previous") == "proposed"
                history_rates = torch.zeros_like(rates) + batch.lr if proposed else rates
                bucket.form.advance(batch, rates, history_rates, own)
                scalars = {"step": batch.steps, "layer_lr": rates}
                if bucket.recomputes:
                    # with the factor of t that the rule's direction has, so that u_t can be
                    # computed again after betas have changed
                    correction = self.rule.inverse_bias_correction(batch.steps, batch.group)
                    scalars["prev_lr"] = history_rates * correction
            for key, values in scalars.items():
                plan.write(key, torch.where(own, values, plan.read(key, here, device)), here)

    # Groups and state

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuses a state_dict before any of it is loaded."""
        check_loaded(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_flat_tensors" not in self.__dict__:  # a copy, with parameters of its own
            self._flat_tensors = FlatTensors()
            for group in self.param_groups:
                if not self._flat_tensors.is_flat(group):
                    self._flat_tensors.note(group, decays_of(group))

    def _name_last_group(self, layers: Layers) -> None:
        try:
            name_layers(self.param_groups, layers)
        except Exception:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        self._flat_tensors.note(group, decays_of(group))

    def _separate_state(self) -> defaultdict[Tensor, State]:
        """The state as it is pickled, see `unpacked`."""
        found = {param: unpacked(state) for param, state in self.state.items()}
        return defaultdict(dict, found)  # a copy makes state for parameters that have none yet

    def layer_learning_rates(self) -> dict[str, LayerRate]:
        """{layer: (S_t, A_t, ‖x_t‖, non-finite steps)} as of each layer's last step.

        ‖x_t‖ is the norm of the gradient or, in the -U forms, of the update; 0 where it was not
        finite and the step was left out.

        One device-to-host copy for each device that parameters are on; a step itself makes none.
        Layers are named by the names given with the parameters, else by group and position.
        The A_t of a layer is that of its first parameter, at the last step for which that had a
        gradient. Layers that have not had a gradient yet are left out.
        """
        keys = ("lipschitz_scale", "layer_lr", "prev_norm", "nonfinite_steps")
        rates: dict[str, LayerRate | None] = {}
        rows: dict[torch.device, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for param in local_params(self, group, self._flat_tensors.tensors(group)):
                if param.layer not in rates and param.tensor_state:
                    rates[param.layer] = None  # keeps the order of the model
                    row = torch.stack([param.state[key].detach() for key in keys])
                    rows.setdefault(row.device, {})[param.layer] = row
        for table in rows.values():
            values = torch.stack(list(table.values())).tolist()
            for name, (scale, lr, size, skipped) in zip(table, values, strict=True):
                rates[name] = LayerRate(scale, lr, max(size, 0.0), int(skipped))
        return {name: rate for name, rate in rates.items() if rate is not None}


# The driver


def step_layers(optimizer: LayerwiseOptimizer, plan: StepPlan) -> Tensor:
    """Takes a step of the plan's layers.

    Returns:
        which of them are active, shape [layers].
    """
    batches = optimizer._batches(plan)

    # Measure.
    rows = [x.to(plan.device) for x in optimizer._measure(plan, batches)]
    sketches = _sketches(plan, rows) if plan.sketch_size else None
    rows = rows or [torch.zeros(0, 3, device=plan.device)]  # other ranks may have gradients
    norms, active = plan.layer_norms(
        torch.cat([x[:, :3] for x in rows]), None if sketches is None else sketches[1]
    )
    if not plan.layers:  # after the collective, in which other ranks take part
        return norms.new_zeros(0, dtype=torch.bool)
    finite = optimizer._finite(plan, norms[:, :2])

    # Follow.
    followed = []
    for (estimator, previous), here in plan.kinds:
        names = ("lipschitz_scale", "prev_norm", "lipschitz_c")[: 3 if estimator.theoretical else 2]
        state = LayerState(*(plan.read(name, here, norms.device, of_layers=True) for name in names))
        followed.append(
            estimator.update(
                state,
                norms[here, 1],
                norms[here, 2],
                _steps_taken(optimizer, norms) + 1.0 if estimator.theoretical else None,
                finite=finite[here],
                active=None if active is None else active[here],
                applied=previous == "applied",
            )
        )
    factor = plan.spread(torch.cat([x[1] for x in followed]))
    stepped = plan.spread(torch.cat([x[2] for x in followed]))

    # Advance.
    optimizer._advance(plan, batches, factor, stepped, finite)
    if sketches is not None:
        _keep_sketches(plan, sketches[0], factor, stepped)
    if not plan.is_in_state:
        plan.put_in_state(optimizer)
    everyone = slice(0, len(plan.params))
    scale = torch.cat([state.scale for state, _, _ in followed])
    prev_norm = torch.cat([state.prev_norm for state, _, _ in followed])
    plan.write("lipschitz_scale", plan.spread(scale), everyone)
    plan.write("prev_norm", plan.spread(prev_norm), everyone)
    for (_, here), (state, _, _) in zip(plan.kinds, followed, strict=True):
        if state.c is not None:
            plan.write_layers("lipschitz_c", state.c, here)
    count = plan.read("nonfinite_steps", everyone, norms.device)
    plan.write("nonfinite_steps", count + ~plan.spread(finite), everyone)
    return torch.ones_like(finite) if active is None else active


# The loop form


def measure(batch: Batch) -> Tensor:
    """‖g_t‖, ‖x_t‖ and ‖x_t - x_{t-1}‖ of each tensor, shape [tensors, 3].

    With a sketch, the sketch of x_t follows in further columns, shape [tensors, 3 + sketch], and
    the change, known only for the whole parameter, is zero.
    """
    rule, signal, group = batch.rule, batch.signal, batch.group
    keys = batch.history_keys
    corrections: list[Numbers] = []
    before: list[Any] = [None] * len(batch.params)
    if signal.of_updates:
        keys = (*batch.moment_keys, *batch.history_keys)
        corrections, before = _corrections(batch, batch.steps), _before(batch, batch.steps - 1)
    rows = []
    for i, (param, raw, state) in enumerate(
        zip(batch.params, batch.grads, batch.states, strict=True)
    ):
        grad = _gradient(param, raw, group)
        old = {key: to_opmath(state[key], group) for key in keys}

        def proposed(i: int = i, grad: Tensor = grad, old: Moments = old) -> Tensor:
            return -batch.lr * rule.direction(rule.moments(grad, old, group), corrections[i], group)

        x = signal.current(grad, proposed)
        grad_norm = norm(grad)
        signal_norm = norm(x) if signal.of_updates else grad_norm
        if batch.sketch:
            shard = batch.local_params[i].shard
            rows.append(sketched(x, grad_norm, signal_norm, shard, batch.sketch))
        else:
            change = x - signal.previous(old, partial(_previous_update, batch, old, before[i]))
            rows += [grad_norm, signal_norm, norm(change)]
    return torch.stack(rows) if batch.sketch else torch.stack(rows).view(-1, 3)


def advance(batch: Batch, rates: Tensor, history_rates: Tensor, stepped: Tensor) -> None:
    """Takes the step: moments, history and parameters.

    Args:
        batch: what to step.
        rates: A_t of each tensor, shape [tensors].
        history_rates: α_t of each tensor with previous="proposed", else A_t, shape [tensors];
            -history_rate·d_t is the update that the next one is compared with.
        stepped: shape [tensors]; where False, a tensor and its state stay as they are, but for the
            history, which becomes zero: a form may have overwritten it in `measure`.
    """
    rule, signal, group = batch.rule, batch.signal, batch.group
    corrections = _corrections(batch, batch.steps)
    factors = zip(*(elements(x, group) for x in (rates, history_rates, stepped)), strict=True)
    draws = drawn(batch.draws, batch.steps, group) if batch.draws else [None] * len(batch.params)
    tensors = zip(batch.params, batch.grads, batch.states, corrections, factors, draws, strict=True)
    for param, raw, state, correction, (rate, history_rate, is_stepped), draw in tensors:
        grad = _gradient(param, raw, group)
        old = {key: to_opmath(state[key], group) for key in batch.moment_keys}
        new = rule.moments(grad, old, group)
        direction = rule.direction(new, correction, group)
        value = to_opmath(param, group)
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            value = value * (1 - batch.lr * group["weight_decay"])
        for key in batch.moment_keys:
            _store(state[key], new[key], is_stepped)
        if batch.history_keys:
            for key, x in signal.new_history(grad, partial(mul, direction, -history_rate)).items():
                _store(state[key], x, is_stepped, otherwise=0.0)
        value = value - rate * direction
        _store(param, value if draw is None else rounded(value, *draw), is_stepped)


def _gradient(param: Tensor, grad: Tensor, group: Group) -> Tensor:
    """g_t: the gradient to descend, with λp added when weight decay is coupled."""
    grad = to_opmath(grad, like=param.dtype)
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        grad = grad + group["weight_decay"] * to_opmath(param, group)
    return grad


def to_opmath(x: Tensor, group: Group | None = None, like: torch.dtype | None = None) -> Tensor:
    """x in its opmath dtype, or that of `like`. With a group, a copy if autograd runs through the
    step, which overwrites x in place."""
    dtype = OPMATH.get(like or x.dtype, like or x.dtype)
    # Tensor.to takes a microsecond to find that there is nothing to do.
    value = x if x.dtype == dtype else x.to(dtype)
    return value.clone() if group is not None and group["differentiable"] else value


def _store(target: Tensor, value: Tensor, where: Any, otherwise: float | None = None) -> None:
    """Stores the value where `where` is True, else `otherwise`; None leaves the target there."""
    if isinstance(where, Tensor):
        other = to_opmath(target) if otherwise is None else otherwise
        target.copy_(torch.where(where, value, other))
    elif where:
        target.copy_(value)
    elif otherwise is not None:
        target.fill_(otherwise)


def _corrections(batch: Batch, steps: Tensor) -> list[Numbers]:
    """The rule's bias corrections, for each tensor."""
    steps = steps.to(OPMATH.get(batch.params[0].dtype, batch.params[0].dtype))
    vectors = batch.rule.bias_corrections(steps, batch.group)
    if not vectors:
        return [()] * len(steps)
    return list(zip(*[elements(x, batch.group) for x in vectors], strict=True))


def _before(batch: Batch, steps: Tensor) -> list[Any]:
    """For each tensor the bias corrections and the rate of step t-1 (`steps`), needed to compute
    u_{t-1} again; None if it is kept."""
    rule, group = batch.rule, batch.group
    if not batch.signal.is_recomputed(rule, group):
        return [None] * len(batch.states)
    steps = steps.clamp(min=1)
    rates = torch.stack([state["prev_lr"] for state in batch.states])
    rates = rates / rule.inverse_bias_correction(steps, group)
    return list(zip(_corrections(batch, steps), rates.unbind(), strict=True))


def _previous_update(batch: Batch, old: Moments, before: tuple[Numbers, Tensor]) -> Tensor:
    """u_{t-1} from the moments of step t-1; zero before the first step, where they give 0/0."""
    corrections, rate = before
    direction = batch.rule.direction(old, corrections, batch.group)
    return torch.where(rate == 0, torch.zeros_like(direction), -rate * direction)


# Absent parameters: they have no gradient, which counts as zero, in a layer that has one


def measure_absent(batch: Batch) -> Tensor:
    """`measure` for absent parameters."""
    if batch.sketch:
        return batch.steps.new_zeros(len(batch.states), 3 + batch.sketch)
    rows: list[Tensor] = []
    keys = (*batch.moment_keys, *batch.history_keys)
    before: list[Any] = [None] * len(batch.states)
    if batch.signal.of_updates:
        before = _before(batch, batch.steps)
    for i, state in enumerate(batch.states):
        old = {key: to_opmath(state[key], batch.group) for key in keys}
        recomputed = partial(_previous_update, batch, old, before[i])
        size = norm(batch.signal.previous(old, recomputed))
        rows += [torch.zeros_like(size), torch.zeros_like(size), size]
    return torch.stack(rows).view(-1, 3)


def advance_absent(batch: Batch, stepped: Tensor) -> None:
    """`advance` for absent parameters: x_t is zero."""
    for state, is_stepped in zip(batch.states, elements(stepped, batch.group), strict=True):
        for key in batch.history_keys:
            _store(state[key], torch.zeros_like(to_opmath(state[key])), is_stepped)


# Sketches


def sketched(x: Tensor, grad_norm: Tensor, signal_norm: Tensor, shard: Shard, k: int) -> Tensor:
    """A row of `measure`, with the sketch of x."""
    shape, offset = shard.place
    norms = torch.stack([grad_norm, signal_norm, torch.zeros_like(signal_norm)])
    return torch.cat([norms, sketch(x, k, shape=shape, offset=offset)])


def _sketches(plan: StepPlan, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the parameters that have one, in their order.

    Args:
        plan: of this step.
        rows: what `measure` gave for each batch.

    Returns:
        the sketches of x_t of whole parameters, shape [sketched, sketch_size]; and
        ‖x_t - x_{t-1}‖ estimated from them, shape [sketched].
    """
    now = [torch.zeros(0, plan.sketch_size, device=plan.device)]
    before = list(now)
    for bucket, row in zip(plan.buckets, rows, strict=True):
        if bucket.sketch:
            more = 0, plan.sketch_size - bucket.sketch
            now.append(pad(row[:, 3:], more))
            before.append(pad(bucket.previous_sketches().to(plan.device), more))
    sketches = plan.whole_sketches(_joined(now))
    return sketches, torch.linalg.vector_norm(sketches - _joined(before), dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, without a copy where only one part follows the empty first."""
    return parts[1] if len(parts) == 2 else torch.cat(parts)


def _keep_sketches(plan: StepPlan, sketches: Tensor, factor: Tensor, stepped: Tensor) -> None:
    for bucket in plan.buckets:
        if bucket.sketch:
            x = sketches[bucket.sketch_rows, : bucket.sketch].to(bucket.params[0].param.device)
            if bucket.params[0].group.get("previous") == "applied":
                x = x * factor[bucket.where, None].to(x)
            bucket.keep_sketches(x, stepped[bucket.where].to(x.device))


def raise_unless(finite: Tensor, plan: StepPlan, after: str) -> None:
    """Names the layers that are not finite, of those with nonfinite="raise", and what is after."""
    bad = [
        layer.name
        for layer, ok in zip(plan.layers, finite.tolist(), strict=True)
        if layer.options.estimator.nonfinite == "raise" and not ok
    ]
    if bad:
        raise RuntimeError(
            "the gradient norm (or its square) is not finite in "
            f"{len(bad)} of {len(plan.layers)} layers "
            f"({', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}); {after}. "
            'nonfinite="skip" leaves such layers alone for the step'
        )


# CUDA graphs


def _check_capture(optimizer: LayerwiseOptimizer) -> None:
    """torch's check of `capturable`, and that a captured step would follow a changing lr."""
    check = "_accelerator_graph_capture_health_check"  # of newer torch
    getattr(optimizer, check if hasattr(optimizer, check) else "_cuda_graph_capture_health_check")()
    if not _is_capturing():
        return  # torch.distributed.checkpoint's trial step has a lr tensor on the CPU
    for group in optimizer.param_groups:
        lr = group["lr"]
        if (
            group["capturable"]
            and isinstance(lr, Tensor)
            and any(lr.device != p.device for p in group["params"])
        ):
            raise ValueError(
                f"capturable=True needs lr on the parameters' device, got it on {lr.device}"
            )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# c="theoretical"


def _steps_taken(optimizer: LayerwiseOptimizer, like: Tensor) -> Tensor:
    """t-1 of Eq. A.3: how often the optimizer, and with it the scheduler, has stepped.

    Not how often a layer has: one that misses steps sees α decay all the same.
    """
    groups = [g for g in optimizer.param_groups if g["params"]]
    counts = [g["lipschitz_step"] for g in groups if "lipschitz_step" in g]
    return torch.stack([like.new_zeros(()), *(x.to(like.device) for x in counts)]).max()


def _count_step(optimizer: LayerwiseOptimizer, active: list[Tensor]) -> None:
    """Counts the step for c="theoretical", even if no layer had a gradient."""
    for group in optimizer.param_groups:
        if group.get("c", optimizer._c) != "theoretical":
            continue
        # ZeRO-3 makes one call of step() for each flat tensor of a group.
        tensors = optimizer._flat_tensors.tensors(group)
        if tensors and any(p is tensors[-1] for p in group["params"]):
            if "lipschitz_step" not in group:
                device = home_device(optimizer)
                group["lipschitz_step"] = torch.zeros((), dtype=_get_scalar_dtype(), device=device)
            count = group["lipschitz_step"]
            taken = torch.cat(active).any().to(count.device)
            count += (taken | has_rate([group], count.device)[0]).to(count.dtype)
