"""The law: how the rate follows the probes. Numbers only.

With N and C the averages over the probes of the slope e0 and of the curvature, the loss falls by
a·N - a²·C/2 in a step of rate a: most at a·C/N = 1, and not at all at a·C/N = 2, where a training
at a constant rate settles whatever the rate is. So a·C/N speaks clearly only early in training,
and the law acts where it is outside two bounds, and holds between:

    start    a = margin × the rate at which the first batch's own slope vanishes along its step
    raise    a·C/N < σ, C > 0:     ln a += trust·κ·ln(σ·N/(a·C)), never faster than t^climb
    lower    a·C/N > limit:        ln a += trust·κ·ln(limit·N/(a·C)), at most by `fall` a probe
    hold     between the two; where C ≤ 0, which does not say how far the loss goes down; and once
             the schedule has fallen below `hold` of its peak

    trust    the square of the mean of σ·e0 - a·curvature over its mean square, with one probe
             more that says nothing: 1 for probes that agree, 1/n for n that are noise
    N        is known to be positive, since the base goes down: it is the mean of the normal
             distribution that the probes leave for it, cut at 0

A schedule with a warm-up has a decay after it, and bears a higher peak than a constant rate: there
`warmup_margin` and `warmup_sigma` are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..estimator import is_number
from .probe import Probe


class Rate(NamedTuple):
    """The rate, and what the law remembers of the probes, as sums with decaying weights.

    Slopes and curvatures are divided by the scale of their probe, so that every probe counts
    alike.
    """

    rate: float = 0.0  # a; 0 before the start
    weight: float = 0.0
    slope: float = 0.0  # of e0
    curvature: float = 0.0
    slope_square: float = 0.0
    product: float = 0.0
    curvature_square: float = 0.0
    step: int = 1  # t after the last probe
    peak: float = 0.0  # the largest s_t seen
    warmup: bool = False  # whether the schedule began below 1


@dataclass(frozen=True)
class Law:
    """How the rate follows the probes.

    Args:
        sigma: σ, from 0.001 to 2: a·C/N below which the rate is raised.
        limit: a·C/N above which it is lowered, at least σ.
        average: what a probe's weight is multiplied by at the next one, from 0 to 0.9999.
        gain: κ, from 0.001 to 1: how much of the way to the bound a probe takes.
        climb: the rate grows at most like t to this power.
        fall: the rate falls at most by this factor at a probe.
        margin: the start, as a part of the first batch's own bound.
        warmup_sigma: σ under a schedule that begins with a warm-up.
        warmup_margin: margin under such a schedule.
        hold: the part of the schedule's peak below which the rate stays.

    Raises:
        ValueError: for a value outside its range.
    """

    sigma: float = 1.0
    limit: float = 2.0
    average: float = 0.8
    gain: float = 0.5
    climb: float = 1.0
    fall: float = 1.5
    margin: float = 0.15
    warmup_sigma: float = 1.4
    warmup_margin: float = 0.5
    hold: float = 0.7

    def __post_init__(self) -> None:
        self._check("sigma", 1e-3, 2.0)
        self._check("warmup_sigma", 1e-3, 2.0)
        self._check("limit", max(self.sigma, self.warmup_sigma), 1e3)
        self._check("average", 0.0, 0.9999)
        self._check("gain", 1e-3, 1.0)
        self._check("climb", 0.0, 10.0)
        self._check("fall", 1.0, 1e3)
        self._check("margin", 1e-12, 1.0)
        self._check("warmup_margin", 1e-12, 1.0)
        self._check("hold", 0.0, 1.0)

    def _check(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")

    def start(self, bound: float, schedule: float = 1.0) -> Rate:
        """The rate to start with.

        Args:
            bound: the rate at which the slope of the first batch vanishes along its own step.
            schedule: s_1; below 1, the schedule has a warm-up.
        """
        warmup = schedule < 1.0
        return Rate(bound * (self.warmup_margin if warmup else self.margin), warmup=warmup)

    def follow(self, now: Rate, probe: Probe, schedule: float, built: float = 1.0) -> Rate:
        """The rate after a probe.

        Args:
            now: the rate before.
            probe: what was measured.
            schedule: s_t of the step that was measured.
            built: the part of its full size that the step had, because momentum builds up. a·C/N
                is that of a step of full size, which is as much larger.
        """
        now = now._replace(peak=max(now.peak, schedule))
        if not math.isfinite(probe.e0) or not probe.scale:
            return now  # nothing is known of the step, or there was none
        if not probe.finite:  # the step has led out of what can be computed
            return now._replace(rate=now.rate / self.fall)
        e0, c = probe.e0 / probe.scale, probe.curvature / probe.scale / built
        news = (1.0, e0, c, e0 * e0, e0 * c, c * c)
        sums = [self.average * old + new for old, new in zip(now[1:7], news, strict=True)]
        if not all(map(math.isfinite, sums)):
            return now
        weight, slope, curvature, slope_square, product, curvature_square = sums
        after = now._replace(
            weight=weight,
            slope=slope,
            curvature=curvature,
            slope_square=slope_square,
            product=product,
            curvature_square=curvature_square,
            step=probe.step + 1,
        )
        if schedule < self.hold * now.peak:
            return after
        most = self.climb * math.log(max(after.step / now.step, 1.0))
        return after._replace(rate=now.rate * math.exp(self._change(after, most)))

    def _change(self, now: Rate, most: float) -> float:
        """Of ln a."""
        slope = now.weight * _mean_of_positive(now)
        sigma = self.warmup_sigma if now.warmup else self.sigma
        if now.curvature <= 0:  # which does not say how far it goes down
            return 0.0
        for bound, up in ((sigma, True), (self.limit, False)):
            excess = bound * slope - now.rate * now.curvature
            square = (
                bound**2 * now.slope_square
                - 2 * bound * now.rate * now.product
                + now.rate**2 * now.curvature_square
            )
            if square > 0 and (excess > 0) == up:
                trust = min(1.0, excess**2 / (square * (now.weight + 1.0)))
                ratio = bound * slope / (now.curvature * now.rate)
                wanted = self.gain * math.log(ratio) if ratio > 0 else -math.inf
                return trust * min(most, max(-math.log(self.fall), wanted))
        return 0.0


def _mean_of_positive(now: Rate) -> float:
    """N: of a normal variable with the mean and the standard error of e0, given that it is > 0."""
    mean = now.slope / now.weight
    variance = max(now.slope_square / now.weight - mean**2, 0.0)
    # The second part stands for what few probes cannot know.
    error = math.sqrt(variance / now.weight + mean**2 / now.weight**3)
    if not error:
        return mean
    z = mean / error
    if z < -6.0:
        return -error / z
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return mean + error * density / (0.5 * math.erfc(-z / math.sqrt(2)))


def next_probe(step: int, every: int) -> int:
    """The step that is probed after `step`: early in training the gaps grow with t."""
    return step + min(max(step // 4, 1), every)
