"""The signal: the slope of one batch's loss along a step, before the step and after it.

With p_{t+1} = p_t - a·u_t the step, a the rate it was taken with, and g_B the gradient of the
loss on a batch B:

    e0 = <g_B(p_t), u_t>         the slope down the step where it starts
    e1 = <g_B(p_{t+1}), u_t>     the slope where it ends
    curvature = (e0 - e1)/a      of the loss on B along u_t
    r = e1/e0                    1: the step is tiny; 0: it ends at the minimum along u_t; -1: at
                                 a point as high as it started from, if the loss is quadratic

r does not depend on the scale of the loss or of the parameters. Where B is independent of u_t (it
is not the batch that u_t was made from) e0 and the curvature are unbiased estimates of those of
the whole loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..history import real


class Probe(NamedTuple):
    """What one batch says of one step."""

    step: int  # t: the step that is measured, from 1
    rate: float  # a: the rate that it was taken with, the schedule included
    e0: float
    e1: float
    scale: float  # max(‖g_B(p_t)‖, ‖g_B(p_{t+1})‖)·‖u_t‖: neither slope can be larger

    @property
    def curvature(self) -> float:
        return (self.e0 - self.e1) / self.rate

    @property
    def r(self) -> float:
        return self.e1 / self.e0 if self.e0 else math.nan

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.e0, self.e1, self.scale)))


def slopes(grads: Sequence[Tensor | None], steps: Sequence[Tensor]) -> Tensor:
    """<g, d>, ‖g‖² and ‖d‖² of each tensor, as rows on the device of the first.

    Args:
        grads: a gradient for each tensor, or None.
        steps: what the step subtracted from each tensor, d = a·u.
    """
    rows = []
    for grad, step in zip(grads, steps, strict=True):
        step = _flat(step)
        along = step if grad is None else _flat(grad)
        dots = torch.stack([torch.dot(along, step), torch.dot(along, along)])
        size = torch.dot(step, step)
        rows.append(torch.cat([dots * (grad is not None), size[None]]))
    home = rows[0].device
    return torch.stack([row.to(home) for row in rows])


def measured(step: int, rate: float, before: Tensor, after: Tensor, sign: float = 1.0) -> Probe:
    """The probe of what `slopes` come to before and after a step of this rate; the only copy to
    the host.

    Args:
        step: t.
        rate: the a that the step was taken with.
        before: the sum of `slopes` at the parameters before the step.
        after: the same at those after it.
        sign: -1 where the loss is maximized.
    """
    (d0, g0, d), (d1, g1, _) = torch.stack([before, after]).tolist()
    largest = max(g0, g1) if not math.isnan(g0 + g1) else math.nan
    scale = math.sqrt(largest) * math.sqrt(d)
    return Probe(step, rate, sign * d0 / rate, sign * d1 / rate, scale / rate)


def _flat(x: Tensor) -> Tensor:
    """Its numbers, of complex ones both parts."""
    flat: Tensor = real(x).reshape(-1)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
