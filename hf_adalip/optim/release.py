"""Gradient release: parameters are stepped as soon as their gradients are there, within backward.

A step costs some hundred calls, whatever it steps. So gradients wait for each other until there
are enough of them, and are freed once their parameters are stepped: only that much of them is ever
alive. Their memory does not become the history's: that would save none, since ‖g_t - g_{t-1}‖ needs
both, and it may be shared with other gradients (autograd gives a.view(n) + b.view(n) one for both).
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .batch import Layer, LocalParam
from .collect import local_param, plan_layers
from .estimator import is_number
from .groups import decays_of
from .optimizer import LipOptimizer
from .rounding import seeds_of
from .sharding import is_sharded, wrappers
from .step import _check_capture, step_layers
from .wrapper import Lipschitz


def release_gradients(optimizer: LipOptimizer, *, bucket_cap_mb: float = 25) -> GradientRelease:
    """Steps parameters within backward, and frees their gradients there.

    The numbers are those of the ordinary step, bit for bit. The loop, schedulers and profilers
    stay as they are: `optimizer.step()` ends the step. It also steps what has a gradient and no
    hook (a parameter added or made trainable later, a gradient assigned by hand), and leaves no
    gradient either.

        release_gradients(optimizer)
        for batch in loader:
            model(batch).backward()
            optimizer.step()
            scheduler.step()

    What needs all gradients at once cannot be used with it, as it finds none: clipping by the norm
    of the whole gradient, GradScaler (train in bf16 instead), hooks of `optimizer.step`. Nor can
    gradient accumulation, which is an error at the second backward before a step.

    Args:
        optimizer: one of the six or LionLip, with one parameter per layer (layers="tensor"), of an
            unsharded model on one process.
        bucket_cap_mb: parameters are stepped together when so many MiB of their gradients are
            there, and the last of them at the end of backward. 0 for each on its own: the least
            memory, for about a millisecond for each parameter.

    Returns:
        a handle, which need not be kept: `remove()`, or the end of its with statement, makes
        the optimizer an ordinary one again; between two steps.

    Raises:
        TypeError: if it is another optimizer.
        ValueError: for an option that needs the gradients of several parameters, for a
            parameter whose gradient is released already, and for a bucket_cap_mb that is no
            number from 0 on. No hook has been set then.
        NotImplementedError: for a parameter that is sharded, or that DistributedDataParallel has.

    Examples:
        >>> from hf_adalip import AdamLip
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamLip(model.named_parameters())
        >>> handle = release_gradients(optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> handle.remove()
    """
    if isinstance(optimizer, Lipschitz):
        raise TypeError(
            f"optimizer is Lipschitz over {type(optimizer.optimizer).__name__}, which steps all "
            "parameters at once: use one of the six (AdamLip for Adam, RMSLip, AdaLip, -U) or "
            "LionLip"
        )
    if not isinstance(optimizer, LipOptimizer):
        raise TypeError(
            "optimizer must be one of the six (AdaLip, RMSLip, AdamLip, AdaLipU, RMSLipU, "
            f"AdamLipU) or LionLip, itself and not what wraps it, got {type(optimizer).__name__}"
        )
    if not is_number(bucket_cap_mb) or not bucket_cap_mb >= 0:
        raise ValueError(f"bucket_cap_mb must be a number >= 0, got {bucket_cap_mb!r}")
    for group in optimizer.param_groups:
        _refuse_options(group)
    _refuse_parameters(optimizer)
    return GradientRelease(optimizer, bucket_cap_mb * 2**20)


def step_parameter(
    optimizer: LipOptimizer,
    param: Tensor,
    group: dict[str, Any] | None = None,
    index: int | None = None,
) -> None:
    """`LipOptimizer.step_parameter`."""
    if not isinstance(param, Tensor):
        raise TypeError(f"parameter must be a tensor of the optimizer's, got {param!r}")
    if optimizer.releases_gradients:
        raise RuntimeError(
            "release_gradients steps the optimizer's parameters already; call its remove() first, "
            "or leave out step_parameter"
        )
    plans = optimizer._parameter_plans
    if plans is None or plans.groups != len(optimizer.param_groups):
        _refuse_parameters(optimizer)
        plans = optimizer._parameter_plans = ParameterPlans(optimizer)
    slot = plans.slot(param)
    if (
        slot is None
        or (group is not None and group is not slot.group)
        or (index is not None and index != slot.param_index)
    ):
        raise ValueError(
            f"parameter, of shape {tuple(param.shape)}, is none of the optimizer's, or not at "
            f"index={index} of the group given: call step_parameter(parameter) alone to have its "
            "place looked up"
        )
    if slot.group["c"] == "theoretical":
        raise ValueError(
            'c="theoretical" counts the calls of step(), and step_parameter takes part of a step; '
            "choose a number"
        )
    _refuse_options(slot.group)
    if param.grad is not None:
        plans.step([param])


class GradientRelease:
    """What `release_gradients` returns."""

    def __init__(self, optimizer: LipOptimizer, cap: float) -> None:
        self._optimizer = optimizer
        self._cap = cap  # bytes
        self._plans = ParameterPlans(optimizer)
        self._buckets: dict[Hashable, _Bucket] = {}  # of each queue
        self._stepped: set[Tensor] = set()  # since the last `optimizer.step()`
        self._active: list[Tensor] = []  # which layers of those are active
        self._started = False
        # Parameters hold their hooks where the garbage collector does not see it.
        hook = _weak_hook(weakref.ref(self))
        self._hooks = {
            param: param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for param in _parameters(optimizer)
            if param.requires_grad
        }
        self._free_hook = optimizer.register_step_post_hook(self._free)
        optimizer._release = self
        _ACTIVE.add(self)

    def remove(self) -> None:
        """Makes the optimizer an ordinary one again."""
        for handle in (*self._hooks.values(), self._free_hook):
            handle.remove()
        self._hooks = {}
        _ACTIVE.discard(self)
        if self._optimizer._release is self:
            self._optimizer._release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _take(self, param: Tensor) -> None:
        """Steps a parameter whose gradient is complete, or keeps it waiting in its bucket."""
        bucket = self._buckets.setdefault(_queue(param.device), _Bucket())
        if param in self._stepped or param in bucket.params:
            raise RuntimeError(
                f"{self._plans.name(param)} got a second gradient since the last "
                "optimizer.step(), and is stepped with its first: gradient release excludes "
                "gradient accumulation "
                "and, for a parameter used in two of them, checkpoint(use_reentrant=True); call "
                "optimizer.step() after every backward, or release.remove()"
            )
        if not self._started:  # it may have come after the release
            _refuse_ddp(self._hooks)
            self._started = True
        if self._plans.slot(param) is None or param.grad is None:
            return
        if not bucket.params:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._empty, bucket))  # at the end of this backward
        bucket.params[param] = None
        bucket.nbytes += param.nbytes
        if bucket.nbytes >= self._cap:
            self._empty(bucket)

    @torch.no_grad()
    def _empty(self, bucket: _Bucket) -> None:
        """Steps the parameters that wait in a bucket."""
        # After a backward that failed, gradients may be gone and groups changed.
        params = [p for p in bucket.params if p.grad is not None and self._plans.slot(p)]
        bucket.params, bucket.nbytes = {}, 0
        if not params:
            return
        self._active.append(self._plans.step(params))
        self._stepped.update(params)
        for param in params:
            param.grad = None

    def finish(self) -> list[Tensor]:
        """Ends the step of the parameters that were stepped within backward.

        Returns:
            which of their layers are active, in several vectors.

        Raises:
            RuntimeError: if one has a gradient again. Nothing has been changed.
            ValueError: if a group was added with a parameter for one of their layers.
        """
        if len(self._optimizer.param_groups) != self._plans.groups:
            _refuse_layers(self._optimizer)
            self._plans.groups = len(self._optimizer.param_groups)
        for param in self._stepped:
            if param.grad is not None:
                raise RuntimeError(
                    f"{self._plans.name(param)} was stepped within backward and has a gradient "
                    "again: something else assigned it (DistributedDataParallel, or code that "
                    "keeps gradients); call release.remove() to have ordinary steps, or "
                    "zero_grad() to go on without it"
                )
        for bucket in self._buckets.values():  # of a backward that failed
            self._empty(bucket)
        active, self._active = self._active, []
        self._stepped = set()
        return active

    def _free(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param in _parameters(optimizer):
            param.grad = None


@dataclass
class _Bucket:
    """Parameters whose gradients wait to be stepped with."""

    params: dict[Tensor, None] = field(default_factory=dict)  # in their order
    nbytes: int = 0  # of them, and so of their gradients


class _Slot(NamedTuple):
    """Where in the optimizer a parameter is."""

    group: dict[str, Any]
    param_index: int


class ParameterPlans:
    """Steps of some of an optimizer's parameters, each a layer of its own, and their plans.

    Attributes:
        groups: how many parameter groups the optimizer had when its layers were last checked.
    """

    def __init__(self, optimizer: LipOptimizer) -> None:
        self.groups = len(optimizer.param_groups)
        self._optimizer = optimizer
        self._slots: dict[Tensor, _Slot] = {}
        self._plans: dict[Tensor, _Plan] = {}

    def step(self, params: list[Tensor]) -> Tensor:
        """Steps parameters that have a gradient and a slot.

        Returns:
            which of their layers are active, shape [params].
        """
        _check_capture(self._optimizer)
        return step_layers(self._optimizer, self._plan(params).step_plan)

    def slot(self, param: Tensor) -> _Slot | None:
        """None for a parameter that is not, or no longer, the optimizer's."""
        if not _is_at(self._optimizer, param, self._slots.get(param)):
            self._slots = {
                here: _Slot(group, index)
                for group in self._optimizer.param_groups
                for index, here in enumerate(group["params"])
            }
            self._plans = {}
        return self._slots.get(param)

    def name(self, param: Tensor) -> str:
        group, index = self._slots[param]
        return f"the parameter of layer {group['layer_names'][index]!r}"

    def _plan(self, params: list[Tensor]) -> _Plan:
        plan = self._plans.get(params[0])
        if plan is None or not plan.holds(self._optimizer, params):
            # Their numbers are packed for one plan at a time.
            stale = {id(self._plans[param]) for param in params if param in self._plans}
            self._plans = {p: x for p, x in self._plans.items() if id(x) not in stale}
            plan = _Plan(self._optimizer, [self._slots[param] for param in params])
            self._plans |= dict.fromkeys(params, plan)
        return plan


class _Plan:
    """The StepPlan of some parameters, valid until what it was made from changes."""

    def __init__(self, optimizer: LipOptimizer, slots: Sequence[_Slot]) -> None:
        self._params = [_local_param(optimizer, slot) for slot in slots]
        layers = [Layer(param.layer, [param]) for param in self._params]
        self.step_plan = plan_layers(optimizer, layers, max(p.sketch for p in self._params))
        self.step_plan.note_state()
        self._made_from = self._facts(optimizer)

    def _facts(self, optimizer: LipOptimizer) -> list[object]:
        options = (*optimizer._plan_options, "capturable", "momentum")
        groups = [
            ([g.get(name) for name in options], list(g.get("no_weight_decay", ())))
            for g in self.step_plan.groups
        ]
        return [groups, *(_kind(param.tensor) for param in self._params)]

    def holds(self, optimizer: LipOptimizer, params: Sequence[Tensor]) -> bool:
        if len(params) != len(self._params):
            return False
        if any(p is not x.tensor for p, x in zip(params, self._params, strict=True)):
            return False
        if any(optimizer.state.get(p.tensor) is not p.tensor_state for p in self._params):
            return False
        if self._facts(optimizer) != self._made_from or not self.step_plan.is_current(None):
            return False
        self.step_plan.pack()
        return True


def _local_param(optimizer: LipOptimizer, slot: _Slot) -> LocalParam:
    group, index = slot
    _refuse_options(group)
    layer, tensor = group["layer_names"][index], group["params"][index]
    of = decays_of(group)[index], seeds_of(group)[index]
    param = local_param(optimizer, layer, tensor, group, *of)
    optimizer._check(param)
    return param


def _kind(param: Tensor) -> tuple[object, ...]:
    sparse = param.grad is not None and param.grad.is_sparse
    return param.device, param.dtype, param.shape, param.stride(), sparse, type(param.grad)


def _queue(device: torch.device) -> Hashable:
    """Where gradients are made one after the other: each device has a thread of its own in
    backward, and may have several streams."""
    return device, torch.cuda.current_stream(device) if device.type == "cuda" else None


_ACTIVE: weakref.WeakSet[GradientRelease] = weakref.WeakSet()


def _weak_hook(release: weakref.ref[GradientRelease]) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        found = release()
        if found is not None:
            found._take(param)

    return hook


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _is_at(optimizer: LipOptimizer, param: Tensor, slot: _Slot | None) -> bool:
    """Whether a parameter is still where it was: an engine or a loaded state may move it."""
    if slot is None or not any(group is slot.group for group in optimizer.param_groups):
        return False
    params = slot.group["params"]
    return slot.param_index < len(params) and params[slot.param_index] is param


def _refuse_options(group: dict[str, Any]) -> None:
    if group["nonfinite"] == "raise":
        raise ValueError(
            'nonfinite="raise" stops before anything has changed, which gradient release cannot: '
            'other parameters are stepped already; choose nonfinite="skip" or "propagate"'
        )
    for name in ("capturable", "differentiable"):
        if group[name]:
            raise ValueError(
                f"{name}=True needs the whole step in optimizer.step(), and gradient release "
                f"takes it within backward; choose {name}=False"
            )


def _refuse_parameters(optimizer: LipOptimizer) -> None:
    params = list(_parameters(optimizer))
    for param in params:
        if is_sharded(param):
            raise NotImplementedError(
                "gradient release needs whole parameters, and one of the optimizer's is sharded "
                "(FSDP, DeepSpeed, tensor parallelism), so that its norm takes all ranks: take "
                "ordinary steps; sharding divides gradients and history by the number of ranks"
            )
    if any(optimizer._flat_tensors.is_flat(group) for group in optimizer.param_groups):
        raise NotImplementedError(
            "gradient release needs the model's parameters, and an engine (DeepSpeed) has put "
            "others in their place: take ordinary steps"
        )
    _refuse_layers(optimizer)
    if any(param in release._hooks for release in _ACTIVE for param in params):
        raise ValueError(
            "the gradient of a parameter is released already, by this optimizer or another one; "
            "remove() that release first"
        )
    _refuse_ddp(params)


def _refuse_layers(optimizer: LipOptimizer) -> None:
    names = itertools.chain.from_iterable(g["layer_names"] for g in optimizer.param_groups)
    layer, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(
            f"layers={optimizer.layers!r} makes one layer {layer!r} of {count} parameters, whose "
            "gradients are needed at once, and gradient release keeps one at a time; choose "
            'layers="tensor"'
        )


def _refuse_ddp(params: Iterable[Tensor]) -> None:
    """DistributedDataParallel sums gradients up after our hooks have run."""
    ours = {id(param) for param in params}
    for wrapper in wrappers(DistributedDataParallel):
        if any(id(param) in ours for param in vars(wrapper).get("_module_parameters", ())):
            raise NotImplementedError(
                "gradient release steps a parameter before DistributedDataParallel has summed its "
                "gradient up over the ranks, so that each would go its own way: take ordinary "
                "steps, or one process"
            )
