"""The step compiled: two passes over memory for a whole batch, whatever its tensors.

Here a Batch becomes what the kernels of its device take: a Spec to be compiled for, tensors of
one memory order, and a table of numbers, none of which is read on the host.
"""

from __future__ import annotations

from array import array
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..batch import Batch, LocalParam
from ..signals import opmath_dtype
from .kernels import COLUMNS, Constants, KernelError, Spec, Tensors, cpu, gpu
from .kernels.build import warn_once

Copies = list[tuple[Tensor, Tensor]]

_dtype, _device_and_shape = attrgetter("dtype"), attrgetter("device", "shape")

_WORTH = 2**20
"""Elements of an optimizer from which on the fused form is the default on a CPU."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def missing(device: torch.device) -> str | None:
    """What the fused form lacks on a device, or None; found out once per process."""
    return cpu.missing() if device.type == "cpu" else gpu.missing(device)


def refuse_unless_possible(params: Any, *, stepped: bool = False) -> None:
    """For `fused=True`.

    Args:
        params: of a group, as it is given to an optimizer.
        stepped: whether they are stepped now. Before that they may be on the meta device, where a
            model is built that gets its memory later.

    Raises:
        RuntimeError: for a device that has no fused form, or where a compiler is missing.
    """
    given = [params] if isinstance(params, Tensor) else params
    tensors = [p[1] if isinstance(p, tuple) else p for p in given]
    for device in {p.device for p in tensors if isinstance(p, Tensor)}:
        if device.type == "meta":
            if stepped:
                raise RuntimeError(
                    "fused=True cannot step parameters on the meta device, which have no memory: "
                    "call model.to_empty(device=...), and make the optimizer after it, because "
                    "to_empty replaces the parameters"
                )
        elif lack := missing(device):
            raise RuntimeError(f"fused=True needs {lack}; fused=None does without it")


def fits(param: Tensor, grad: Tensor | None) -> bool:
    """Whether the fused form can take a parameter: real, without gaps or overlaps in memory, and,
    like its gradient, no tensor subclass that has operators of its own."""
    if grad is not None and (grad.dtype != param.dtype or not _is_plain(grad)):
        return False
    return _is_plain(param) and param.dtype in _DTYPES and _dense(param)


def takes(param: LocalParam) -> bool:
    """Whether the fused form can take a parameter, its gradient and its history."""
    grad = None if param.grad is None else param.shard.local(param.grad)
    is_indexed = bool(param.sketch) or param.seed is not None
    has_indices = not is_indexed or param.shard.start is not None
    return fits(param.shard.local(param.param), grad) and has_indices


def _is_plain(x: Tensor) -> bool:
    own_operators = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return x.layout == torch.strided and not own_operators


def pays(size: int) -> bool:
    """Whether the fused form is the default on a CPU for this many elements: only where it saves
    more time than finding the compiler takes."""
    return size >= _WORTH and missing(torch.device("cpu")) is None


def forgo(error: KernelError) -> None:
    """Says, once a process, why a step that nobody asked to be fused is not."""
    warn_once(f"{str(error).splitlines()[0]}; steps go without them, and take longer")


def prepare(batch: Batch) -> None:
    """Does what may fail: `measure` may change the history.

    Raises:
        KernelError: where the kernels cannot be compiled; found out here on a CPU.
        ValueError: for gradients or state of another shape than their parameter's.
    """
    made = _prepared(batch)
    if _backend(batch.params[0]) is cpu:
        cpu.library(made.spec)


def measure(batch: Batch) -> Tensor:
    """As `step.measure`."""
    spec, tensors, _, constants, numbers = _prepared(batch)
    rows: Tensor = _backend(batch.params[0]).measure(spec, tensors, numbers, constants)
    return rows


def advance(batch: Batch, rates: Tensor, history_rates: Tensor, stepped: Tensor) -> None:
    """As `step.advance`."""
    spec, tensors, copies, constants, _ = _prepared(batch)
    numbers = _numbers(batch, (rates, history_rates))
    _backend(batch.params[0]).advance(spec, tensors, numbers, constants, stepped)
    for original, copy in copies:
        original.copy_(copy)
    increment_version(batch.params)  # autograd refuses a backward through what was changed


def blend(params: list[Tensor], others: list[Tensor], weights: Tensor, stepped: Tensor) -> None:
    """p = q + w·(p - q) of each tensor and its other one, where `stepped`; for `Lipschitz`.

    It is a step of plain SGD with the rate w - 1 and the gradient q - p, which is 0, and leaves p
    as it is, where both are equal.

    Args:
        params: as `fits` says, of one device and dtype.
        others: as params.
        weights: w, shape [tensors].
        stepped: shape [tensors]; where False, a parameter stays as it is.
    """
    dtype = params[0].dtype
    alike = [_like(p, q, dtype) for p, q in zip(params, others, strict=True)]
    numbers = weights.new_ones(len(params), len(COLUMNS), dtype=opmath_dtype(dtype))
    numbers[:, COLUMNS.index("rate")] = weights - 1
    tensors = Tensors(params, alike, (), [], [])
    constants = Constants(0.0, 0.0, 0.0, 0.0, weight_decay=-1.0)
    _backend(params[0]).advance(_blending(dtype), tensors, numbers, constants, stepped)
    increment_version(params)


def _blending(dtype: torch.dtype) -> Spec:
    return Spec(rule="SGD", signal="gradient", dtype=dtype, history=None, coupled=True)


def compile_for(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles on a CPU what `Lipschitz` measures and blends parameters of a dtype with.

    Raises:
        KernelError: if they cannot be compiled.
    """
    if device.type == "cpu":
        cpu.library(Spec(rule="SGD", signal="gradient", dtype=dtype, history=dtype))
        cpu.library(_blending(dtype))


def _backend(param: Tensor) -> Any:
    return cpu if param.device.type == "cpu" else gpu


class _Prepared(NamedTuple):
    """What kernels are called with."""

    spec: Spec
    tensors: Tensors
    copies: Copies  # state that is in `tensors` as a copy, to be written back
    constants: Constants
    numbers: Tensor  # of `measure`


def _prepared(batch: Batch) -> _Prepared:
    """Made once a step."""
    if batch.prepared is None:
        spec = _spec(batch)
        made = _tensors(batch, spec)
        batch.prepared = _Prepared(spec, *made, _constants(batch.group), _numbers(batch))
    prepared: _Prepared = batch.prepared
    return prepared


def _spec(batch: Batch) -> Spec:
    rule, group, history = batch.rule, batch.group, batch.history_keys
    signal = _signal(batch)
    has_early = bool(history) and signal == "gradient" and _backend(batch.params[0]) is cpu
    return Spec(
        rule=rule.name,
        signal=signal,
        dtype=batch.params[0].dtype,
        history=batch.states[0][history[0]].dtype if history else None,
        momentum=bool(group.get("momentum")),
        nesterov=group.get("nesterov", False),
        eps_in_sqrt=group.get("eps_in_sqrt", False),
        maximize=group["maximize"],
        coupled=bool(group["weight_decay"]) and not group["decoupled_weight_decay"],
        sketch=batch.sketch,
        early=has_early and not batch.stoppable,
        stochastic=bool(batch.draws),
    )


def _signal(batch: Batch) -> Literal["gradient", "update", "recomputed"]:
    if not batch.signal.of_updates:
        return "gradient"
    return "recomputed" if batch.signal.is_recomputed(batch.rule, batch.group) else "update"


def _constants(group: Any) -> Constants:
    beta1, beta2 = group.get("betas", (group.get("alpha", 0.0), 0.0))
    momentum, eps = group.get("momentum", 0.0), group.get("eps", 0.0)
    return Constants(*map(float, (momentum, beta1, beta2, eps, group["weight_decay"])))


def _numbers(batch: Batch, rates: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The table of `COLUMNS`: for `advance` with rates and those of the history, else `measure`."""
    group, lr = batch.group, batch.lr
    dtype = opmath_dtype(batch.params[0].dtype)
    steps = batch.steps.to(dtype)
    columns: dict[str, Tensor | float] = {"lr": lr}
    if rates is not None:
        columns = {"rate": rates[0], "history_rate": rates[1], "decay": 1.0, "step": steps}
        if group["decoupled_weight_decay"]:
            columns["decay"] = 1 - lr * group["weight_decay"]
    elif _signal(batch) == "gradient":
        columns = {}
    elif _signal(batch) == "recomputed":
        before = (batch.steps - 1).clamp(min=1)
        prev_lr = torch.stack([state["prev_lr"] for state in batch.states])
        columns["prev_rate"] = prev_lr / batch.rule.inverse_bias_correction(before, group)
        columns |= _corrections(batch, before.to(dtype), "prev_")
    if columns:
        columns |= _corrections(batch, steps)
    numbers = torch.ones(len(batch.params), len(COLUMNS), dtype=dtype, device=steps.device)
    for name, value in columns.items():
        numbers[:, COLUMNS.index(name)] = value
    return numbers


def _corrections(batch: Batch, steps: Tensor, prefix: str = "") -> dict[str, Tensor | float]:
    vectors = batch.rule.bias_corrections(steps, batch.group)
    return {f"{prefix}correction{i}": vector for i, vector in enumerate(vectors, start=1)}


# Memory order


class _Layout(NamedTuple):
    """What is known of a batch's tensors while they stay where they are. (Tensors themselves are
    not kept: who replaces state to have its memory would not get it.)"""

    strides: list[tuple[int, ...]]
    devices_and_shapes: list[Any]
    starts: list[int]
    addresses: array[int]  # of the state


def _tensors(batch: Batch, spec: Spec) -> tuple[Tensors, Copies]:
    params = batch.params
    before: _Layout | None = batch.memo.get(spec)
    strides = before.strides if before else list(map(Tensor.stride, params))
    expected = before.devices_and_shapes if before else list(map(_device_and_shape, params))

    def alike(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        # A kernel would read past the end of tensors of another shape.
        if list(map(_device_and_shape, tensors)) != expected:
            raise ValueError("a gradient or state has another shape or device than its parameter")
        if set(map(_dtype, tensors)) == {dtype} and list(map(Tensor.stride, tensors)) == strides:
            return tensors
        return [_like(p, x, dtype) for p, x in zip(params, tensors, strict=True)]

    grads = batch.grads
    if any(map(Tensor.is_neg, grads)):
        grads = [g.resolve_neg() for g in grads]
    grads = alike(grads, spec.dtype)
    count, keys = len(batch.moment_keys), (*batch.moment_keys, *batch.history_keys)
    rows = [[state[name] for state in batch.states] for name in keys]

    def together(rows: list[list[Tensor]], starts: list[int]) -> Tensors:
        history = [x for row in rows[count:] for x in row]
        seeds = [x.seed for x in batch.draws]
        return Tensors(params, grads, tuple(rows[:count]), history, starts, seeds)

    if before is not None:
        tensors = together(rows, before.starts)
        if tensors.state_rows == before.addresses:  # else x.data = ... has moved state
            return tensors, []
    dtypes = [spec.dtype] * count + [spec.history or spec.dtype]
    if batch.states[0] is batch.local_params[0].state:  # and no view of it
        for row, dtype in zip(rows, dtypes, strict=False):
            _lay_out(params, row, dtype)
    used = [alike(row, dtype) for row, dtype in zip(rows, dtypes, strict=False)]
    indexed = batch.local_params if batch.sketch or batch.draws else []
    starts = [p.shard.start or 0 for p in indexed]
    tensors = together(used, starts)
    changed = [(row, other) for row, other in zip(rows, used, strict=True) if row is not other]
    if not changed:
        batch.memo[spec] = _Layout(strides, expected, starts, tensors.state_rows)
    pairs = [pair for row, other in changed for pair in zip(row, other, strict=True)]
    return tensors, [(original, copy) for original, copy in pairs if original is not copy]


def _lay_out(params: list[Tensor], state: list[Tensor], dtype: torch.dtype) -> None:
    """Gives state the memory order of its parameters for good, rather than a copy at each step:
    it may have been saved before `to(memory_format=channels_last)`."""
    for param, x in zip(params, state, strict=True):
        if x.dtype == dtype and _strides(x) != _strides(param):
            x.data = _like(param, x, dtype)


def _like(param: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or a copy of it of that dtype whose elements lie in memory as the parameter's do."""
    if x.dtype == dtype and _strides(x) == _strides(param):
        return x
    made = torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=x.device)
    return made.copy_(x)


def _strides(x: Tensor) -> list[int]:
    """Strides that matter: in a dimension of one element, any will do."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


def _dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
