"""What is seen of every step of a training, without waiting for the device: norms and limits of
clipped gradients, and losses. Numbers stay on the device until they are asked for."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 64
"""Steps whose numbers are kept as they are, before they are made into counts."""

CHANGE = 0.05
"""Of the factor of a clip, from one step to the next, from which on S sees it."""


@dataclass(frozen=True)
class Clipped:
    """What clipping did in some steps."""

    pairs: int  # of steps, one after the other, with finite gradients
    changes: int  # pairs between which the factor changed
    least: float  # the smallest factor, and the largest
    most: float
    usual: float  # the median norm of the last steps


class Clipping:
    """The factors of a clip, step by step.

    `steps` and `clipped` are of all steps, and `changes()` is of those since it was last asked for
    and had enough of them.
    """

    def __init__(self) -> None:
        self._norms: list[Any] = []  # not counted yet
        self._limits: list[Any] = []
        self._previous: Tensor | None = None  # factor
        self._counts: Tensor | None = None  # of all: steps, clipped, those clipped to 0
        self._window: Tensor | None = None  # pairs, changes
        self._extremes: Tensor | None = None  # least and most
        self._last = torch.zeros(0)

    def add(self, norm: Tensor | float, limit: Tensor | float) -> None:
        """A gradient of this norm was clipped to the limit, if that is less."""
        self._norms.append(norm.detach() if isinstance(norm, Tensor) else norm)
        self._limits.append(limit.detach() if isinstance(limit, Tensor) else limit)
        if len(self._norms) >= AT_ONCE:
            self._count()

    def _count(self) -> None:
        if not self._norms:
            return
        given = (*self._norms, *self._limits)
        device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
        norms, limits = (_vector(numbers, device) for numbers in (self._norms, self._limits))
        self._norms, self._limits = [], []
        factors = torch.where(norms > 0, (limits / norms).clamp(max=1.0), 1.0)
        factors = torch.where(norms.isfinite(), factors, math.nan)  # NaN equals and exceeds nothing
        if self._previous is None:
            self._previous = factors.new_full((1,), math.nan)
            self._counts, self._window = factors.new_zeros(3), factors.new_zeros(2)
            self._extremes = factors.new_tensor([1.0, 0.0])
        assert self._counts is not None  # made together
        assert self._window is not None
        assert self._extremes is not None
        ratios = factors / torch.cat([self._previous, factors[:-1]])
        self._previous = factors[-1:]
        away = (norms > 0) & (limits <= 0)
        self._counts += torch.stack([norms.isfinite().sum(), (factors < 1).sum(), away.sum()])
        self._window += torch.stack(
            [ratios.isfinite().sum(), ((ratios - 1.0).abs() > CHANGE).sum()]
        )
        least, most = factors.nan_to_num(1.0).amin(), factors.nan_to_num(0.0).amax()
        self._extremes = torch.stack(
            [torch.minimum(self._extremes[0], least), torch.maximum(self._extremes[1], most)]
        )
        self._last = torch.cat([self._last.to(device), norms])[-AT_ONCE:]

    def _counted(self) -> tuple[int, int, int]:
        self._count()
        steps, clipped, away = [0, 0, 0] if self._counts is None else self._counts.tolist()
        return int(steps), int(clipped), int(away)

    @property
    def steps(self) -> int:
        """With a finite gradient that might have been clipped."""
        return self._counted()[0]

    @property
    def clipped(self) -> int:
        return self._counted()[1]

    @property
    def away(self) -> bool:
        """Whether a gradient was clipped to nothing."""
        return self._counted()[2] > 0

    def changes(self, least: int) -> Clipped | None:
        """Of the steps since the last time, or None of fewer pairs of them than `least`."""
        self._count()
        if self._window is None or self._extremes is None:
            return None
        pairs, changes, low, high = torch.cat([self._window, self._extremes]).tolist()
        if pairs < least:
            return None
        self._window.zero_()
        self._extremes = self._extremes.new_tensor([1.0, 0.0])
        norms = [norm for norm in self._last.tolist() if math.isfinite(norm)]
        usual = sorted(norms)[len(norms) // 2]
        return Clipped(int(pairs), int(changes), low, high, usual)


class Losses:
    """The losses of a training, the first and the last ones of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[Tensor] = []
        self._last: deque[Tensor] = deque(maxlen=AT_ONCE)

    def add(self, loss: Tensor) -> None:
        self.count += 1
        if len(self._first) < AT_ONCE // 4:
            self._first.append(loss.detach())
        self._last.append(loss.detach())

    @property
    def first(self) -> float:
        """The mean of the first ones."""
        return statistics.fmean(float(loss) for loss in self._first) if self.count else math.nan

    @property
    def last(self) -> float:
        """The mean of the last ones; not finite if the very last is not."""
        if not self.count:
            return math.nan
        losses = [float(loss) for loss in self._last]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return statistics.fmean(finite) if math.isfinite(losses[-1]) else losses[-1]


def _vector(numbers: list[Any], device: torch.device) -> Tensor:
    return torch.stack(
        [torch.as_tensor(x, dtype=torch.float32).to(device).reshape(()) for x in numbers]
    )
