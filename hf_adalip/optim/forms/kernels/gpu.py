"""The backend for GPUs: the kernels of step_triton.py, launched.

A batch is one launch for `measure`, one that adds up what its chunks gave, and one for `advance`,
whatever the number of its tensors. Nothing here waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, reduce
from itertools import accumulate, chain
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import Constants, Spec, Tensors
from .tables import on_device

BLOCK = 4096
"""Elements of a chunk, which a program takes."""

STEP = 1024
"""Elements that a program works on at a time: 8 of a thread. With more, registers run short."""

SKETCHED_BLOCKS = 32
"""Blocks of k elements in a chunk that is sketched: partial sketches are 1/32 of what is read."""

ROWS = 1024
"""Partial sums that are added side by side."""

_SLICE = 1024
"""Numbers of a sketch that a program takes."""

_Options = dict[str, Any]


def missing(device: torch.device) -> str | None:
    """What the kernels lack to run on a device, or None."""
    try:
        from . import step_triton
    except ImportError as error:
        return f"Triton (pip install triton): {error}"
    if type(step_triton.measure).__name__ == "InterpretedFunction":  # TRITON_INTERPRET=1
        return None
    if device.type in ("cpu", "meta", "mps"):
        return f"a device that Triton compiles for, which {device.type!r} is not"
    return _driver_lacks()


@cache
def _driver_lacks() -> str | None:
    from triton.runtime import driver

    try:  # finds the GPU, and a C compiler where it takes one
        target = driver.active.get_current_target()
    except Exception as error:
        return f"Triton's driver: {error}"
    if target.backend == "cuda" and target.arch < 70:
        return f"a GPU of compute capability 7.0 or higher, not {target.arch / 10}"
    return None


def measure(spec: Spec, tensors: Tensors, numbers: Tensor, constants: Constants) -> Tensor:
    """‖g_t‖, ‖x_t‖ and ‖x_t - x_{t-1}‖ of each tensor, and sketches; see kernels/__init__.py."""
    from . import step_triton as kernels

    n, k = len(tensors.params), spec.sketch
    batch = _batch(tensors, numbers.device, k)
    slices = max(1, k // _SLICE)
    sums = numbers.new_empty(batch.chunks, slices, 3)
    norms = numbers.new_empty(n, 3)
    given = (batch.table, numbers, _constants(spec, constants, numbers), batch.owner, sums)
    flags = _flags(spec)
    with _on(numbers.device):
        if k:
            parts = numbers.new_empty(batch.chunks, k)
            cut = {"WIDTH": k, "SLICE": k // slices, "BLOCKS": SKETCHED_BLOCKS}
            if batch.chunks:
                kernels.sketch[batch.chunks, slices](*given, parts, **flags, **cut, **_LAUNCH)
            sketches = numbers.new_empty(n, k)
            kernels.add[n, k // 32](
                *(batch.table, parts, sketches),
                **{"PER": 1, "WIDTH": k, "ROOT": False, "ROWS": 32, "COLUMNS": 32},
                **_LAUNCH,
            )
        elif batch.chunks:
            kernels.measure[(batch.chunks,)](*given, **flags, **_whole(spec, batch))
        kernels.add[n, 1](
            *(batch.table, sums, norms),
            **{"PER": slices, "WIDTH": 3, "ROOT": True, "ROWS": ROWS, "COLUMNS": 4},
            **_LAUNCH,
        )
    if not k:
        return norms
    norms[:, 2] = 0
    return torch.cat([norms, sketches], dim=1)


def advance(
    spec: Spec, tensors: Tensors, numbers: Tensor, constants: Constants, active: Tensor
) -> None:
    """Takes the step where `active`, shape [n], is True; elsewhere makes the history zero."""
    from . import step_triton as kernels

    batch = _batch(tensors, numbers.device, 0)
    given = (batch.table, numbers, _constants(spec, constants, numbers), batch.owner, active)
    if batch.chunks:
        with _on(numbers.device):
            flags = _flags(spec) | {"STOCHASTIC": spec.stochastic}
            kernels.advance[(batch.chunks,)](*given, **flags, **_whole(spec, batch))


# What kernels are launched with

_LAUNCH: _Options = {"num_warps": 4, "enable_fp_fusion": False}


@cache
def _flags(spec: Spec) -> _Options:
    """What every kernel is compiled for."""
    sgd = "plain" if not spec.momentum else "nesterov" if spec.nesterov else "momentum"
    return {
        "RULE": sgd if spec.rule == "SGD" else spec.rule,
        "SIGNAL": spec.signal,
        "COUPLED": spec.coupled,
        "DTYPE": _type(spec.dtype),
    }


def _whole(spec: Spec, batch: _Batch) -> _Options:
    """The options of a kernel that takes chunks of BLOCK elements."""
    return {
        "HISTORY_DTYPE": spec.history and _type(spec.history),
        "ACCESS": "vectors" if batch.aligned else "plain",
        "BLOCK": BLOCK,
        "STEP": STEP,
        **_LAUNCH,
    }


@cache
def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _constants(spec: Spec, given: Constants, numbers: Tensor) -> Tensor:
    """The constants on the device, as step_triton.py numbers them."""
    momentum, beta1, beta2, eps, weight_decay = given
    content = (
        *(momentum, beta1, 1 - beta1, beta2, 1 - beta2),
        *((eps, 0.0) if spec.eps_in_sqrt else (0.0, eps)),
        *(weight_decay, -1.0 if spec.maximize else 1.0),
    )
    dtype = numbers.dtype

    def made() -> Tensor:  # on the host, whatever torch's default device is
        return torch.tensor(content, dtype=dtype, device="cpu")

    return on_device((content, dtype), numbers.device, made)


class _Batch(NamedTuple):
    table: Tensor  # [n + 1, 9] int64: the records of step_triton.py
    owner: Tensor  # [chunks] int32, the tensor of each chunk
    chunks: int
    aligned: bool  # whether every tensor begins at a multiple of 16 bytes


def _batch(tensors: Tensors, device: torch.device, sketch: int) -> _Batch:
    """Where the tensors are, and how they are cut into chunks."""
    zeros = [0] * len(tensors.params)
    moments = [list(map(Tensor.data_ptr, moment)) for moment in tensors.moments]
    columns = (
        list(map(Tensor.data_ptr, tensors.params)),
        list(map(Tensor.data_ptr, tensors.grads)),
        *(moments + [zeros] * (2 - len(moments))),
        list(map(Tensor.data_ptr, tensors.history)) or zeros,
        list(map(Tensor.numel, tensors.params)),
        tensors.starts or zeros,
        tensors.seeds or zeros,
    )
    *pointers, sizes, starts, seeds = map(tuple, columns)
    firsts = _firsts(sizes, starts if sketch else None, sketch or BLOCK)

    def records() -> Tensor:
        table = torch.zeros(9, len(firsts), dtype=torch.int64, device="cpu")
        table[:8, :-1] = torch.tensor(columns, device="cpu")
        table[8] = torch.tensor(firsts, device="cpu")
        return table.T.contiguous()

    def owner() -> Tensor:
        counts = torch.tensor(firsts, device="cpu").diff()
        return torch.repeat_interleave(counts).to(torch.int32)

    return _Batch(
        on_device((*pointers, sizes, starts, seeds, firsts), device, records),
        on_device(firsts, device, owner),
        firsts[-1],
        _aligned(tuple(pointers)),
    )


@lru_cache(maxsize=256)
def _aligned(pointers: tuple[tuple[int, ...], ...]) -> bool:
    return reduce(or_, chain(*pointers), 0) % 16 == 0


@lru_cache(maxsize=256)
def _firsts(sizes: tuple[int, ...], starts: tuple[int, ...] | None, block: int) -> tuple[int, ...]:
    """The first chunk of each tensor, and the number of chunks.

    A chunk is a block of a tensor; or, where `starts` are given, as many as are sketched together
    of the whole parameter's blocks.
    """
    if starts is None:
        counts = (-(-size // block) for size in sizes)
    else:
        spans = zip(starts, sizes, strict=True)
        blocks = (-(-(start % block + size) // block) if size else 0 for start, size in spans)
        counts = (-(-count // SKETCHED_BLOCKS) for count in blocks)
    return tuple(accumulate(counts, initial=0))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
