"""What the kernels of the fused form are compiled for, and what they are called with.

A backend (cpu.py: C++, gpu.py: Triton) is two functions:

    measure(spec, tensors, numbers, constants) -> rows [n, 3 + k]
        ‖g‖, ‖x‖ and ‖x - x_prev‖ of each tensor (x_prev = 0 without a history); or, with a
        sketch, ‖g‖, ‖x‖, 0 and the k numbers of the sketch of x. If `early`, x is the history
        from then on.
    advance(spec, tensors, numbers, constants, active) -> None
        writes parameters, moments and, unless `early`, history; of a tensor whose active [n] is
        False only the history, which becomes zero.

Arithmetic and results are of the opmath dtype. Sums are added up in an order that depends on the
sizes of the tensors alone, so that all ranks have the same S, bit for bit.

A sketch (k a power of two, at least 32) is the sum of sign(i)·x_i in bucket(i), i the row-major
index of an element in its whole parameter. In 32-bit arithmetic that wraps, with // the integer
division and

    mix(x):  x ^= x >> 16; x *= 0x85ebca6b; x ^= x >> 13; x *= 0xc2b2ae35; x ^= x >> 16

sign(i) is -1 where bit i mod 32 of mix(i//32 + 0x9e3779b9) is set, and bucket(i) is
(i + mix(i//k + 2·0x9e3779b9)) mod k. So one hash gives 32 signs, and runs of elements are added
to runs of buckets.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class KernelError(RuntimeError):
    """A kernel that could not be compiled; nothing has been changed then."""


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for."""

    rule: str  # the name of one of rules/
    signal: Literal["gradient", "update", "recomputed"]  # x = g; û; û, with u_prev from the moments
    dtype: torch.dtype  # of parameters, gradients and moments
    history: torch.dtype | None  # of what is kept of x, in the parameter's shape
    momentum: bool = False
    nesterov: bool = False
    eps_in_sqrt: bool = False
    maximize: bool = False
    coupled: bool = False  # λp is a part of the gradient
    sketch: int = 0  # k, or 0 for none
    early: bool = False  # the first pass writes the history, of gradients; on a CPU
    stochastic: bool = False  # bfloat16 parameters are rounded as optim/rounding.py says


@dataclass
class Tensors:
    """The n tensors of each role, dense, and of the same memory order in all roles."""

    params: list[Tensor]
    grads: list[Tensor]
    moments: tuple[list[Tensor], ...]  # as `Rule.state_keys` names them
    history: list[Tensor]  # empty where Spec.history is None
    starts: list[int]  # index of the first element in its whole parameter; empty where unused
    seeds: list[int] = field(default_factory=list)  # for stochastic rounding; empty without

    @cached_property
    def rows(self) -> array[int]:
        """Sizes, then the addresses of each role, `starts` and `seeds`: n numbers each."""
        rows = array("q", map(Tensor.numel, self.params))
        for role in (self.params, self.grads):
            rows.extend(map(Tensor.data_ptr, role))
        return rows + self.state_rows

    @cached_property
    def state_rows(self) -> array[int]:
        """The part of `rows` that is of the state."""
        rows = array("q")
        for role in (*self.moments, self.history):
            rows.extend(map(Tensor.data_ptr, role))
        rows.extend(self.starts)
        rows.extend(self.seeds)
        return rows


class Constants(NamedTuple):
    """Numbers of a group that schedules may change, and so arguments of a kernel."""

    momentum: float
    beta1: float  # RMSprop's alpha
    beta2: float
    eps: float
    weight_decay: float


COLUMNS = (
    "lr",  # α_t
    "correction1",  # 1 - β1^t
    "correction2",
    "prev_rate",  # u_{t-1} = -prev_rate·d_{t-1}, or zero where it is 0
    "prev_correction1",  # 1 - β1^{t-1}
    "prev_correction2",
    "rate",  # A_t
    "history_rate",  # the history becomes -history_rate·d_t, where it is of updates
    "decay",  # what p is multiplied with before the step
    "step",  # t, for stochastic rounding
)
"""`numbers` is [n, 10] in the opmath dtype, on the tensors' device, with these columns. `measure`
reads the first six, `advance` 1, 2 and the last four; others may be anything."""
