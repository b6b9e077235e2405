"""The law: how the rate follows the probes. Numbers only.

With N and C the averages of e0 and of the curvature over the probes, the loss falls by
a·N - a²·C/2 in a step of rate a. That is most at a = N/C, and nothing at 2·N/C: what a training
at a constant rate settles at, whatever the rate. The law keeps a·C/N at σ between the two: the
rate is as large as leaves a fall of 1 - σ/2 of the slope's promise, and where the fall that is
left is less, the rate sinks, as a schedule would have it.

    start    a = margin × the rate at which the first batch's own slope vanishes along its step
    follow   ln a += κ·ln(σ·N/(C·a)); C ≤ 0 < N: as fast as it may climb; N ≤ 0: falls
    climb    never faster than t: from the probe at t to the one at t' at most × (t'/t)^climb
    hold     once the schedule has fallen below `hold` of its peak, a stays
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..lipschitz import is_number
from .probe import Probe


class Rate(NamedTuple):
    """The rate, and what the law remembers of the probes."""

    rate: float = 0.0  # a; 0 before the start
    slope: float = 0.0  # N, as a sum with decaying weights; of e0/scale
    curvature: float = 0.0  # C, likewise
    step: int = 1  # t of the last probe
    peak: float = 0.0  # the largest s_t seen


@dataclass(frozen=True)
class Law:
    """How the rate follows the probes.

    Args:
        sigma: σ, in (0, 2): a·C/N is kept there.
        average: what a probe's weight is multiplied by at the next one, in [0, 1).
        gain: κ, in (0, 1]: how much of the way to the set point a probe takes.
        climb: the rate grows at most like t to this power.
        fall: the rate falls at most by this factor at a probe.
        margin: the start, as a part of the first batch's own bound.
        hold: the part of the schedule's peak below which the rate stays.
    """

    sigma: float = 1.5
    average: float = 0.8
    gain: float = 0.5
    climb: float = 1.0
    fall: float = 1.5
    margin: float = 0.15
    hold: float = 0.7

    def __post_init__(self) -> None:
        limits = {
            "sigma": (0.0, 2.0),
            "average": (0.0, 1.0),
            "gain": (0.0, 1.0),
            "climb": (0.0, math.inf),
            "fall": (1.0, math.inf),
            "margin": (0.0, 1.0),
            "hold": (0.0, 1.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high or math.isinf(value):
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")

    def start(self, bound: float) -> Rate:
        """The rate to start with.

        Args:
            bound: the rate at which the slope of the first batch vanishes along its own step.
        """
        return Rate(rate=self.margin * bound)

    def follow(self, now: Rate, probe: Probe, schedule: float) -> Rate:
        """The rate after a probe.

        Args:
            now: the rate before.
            probe: what was measured.
            schedule: s_t of the step that was measured.
        """
        peak = max(now.peak, schedule)
        held = schedule < self.hold * peak
        if not math.isfinite(probe.e0) or not probe.scale:
            return now._replace(peak=peak)  # nothing is known of the step, or there was none
        if not probe.finite:  # the step has led out of what can be computed
            low = now.rate / self.fall
            return now._replace(rate=low, step=probe.step, peak=peak)
        slope = self.average * now.slope + probe.e0 / probe.scale
        curvature = self.average * now.curvature + probe.curvature / probe.scale
        rate = now.rate
        if not held:
            most = self.climb * math.log(max(probe.step + 1, now.step + 1) / now.step)
            change = -math.log(self.fall)
            if slope > 0:
                wanted = self.sigma * slope / (curvature * rate) if curvature > 0 else math.inf
                change = max(change, min(most, self.gain * math.log(wanted)))
            rate *= math.exp(change)
        return Rate(rate, slope, curvature, probe.step + 1, peak)


def next_probe(step: int, every: int) -> int:
    """The step that is probed after `step`: early in training the gaps grow with t."""
    return step + min(max(step // 4, 1), every)
