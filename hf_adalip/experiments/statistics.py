"""The measures of a study: the paper's (§5), and intervals. Numbers in, numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """How a measure spreads over learning rates; `std` divides by their number, not one less."""

    best: float
    median: float
    mean: float
    std: float


def spread(values: Sequence[float], lower: bool = False) -> Spread:
    """The four accuracy rows of Tables 2 to 4.

    The standard deviation is the population's. The paper does not say which it took, but its
    numbers do: of eight values with a mean of 0.663, a median of 0.976 and a maximum of 1 (SGD on
    MNIST) the other one is 0.43 or more, and 0.422 is printed.

    Args:
        values: one for each learning rate; infinite where a loss is. Of one value, and of
            infinite ones, the standard deviation is NaN.
        lower: whether lower is better, as for a loss.

    Examples:
        >>> spread([0.5, 1.0, 0.9])
        Spread(best=1.0, median=0.9, mean=0.8, std=0.216024689946...)
    """
    best = min(values) if lower else max(values)
    known = len(values) > 1 and all(map(math.isfinite, values))
    std = statistics.pstdev(values) if known else math.nan
    return Spread(best, statistics.median(values), statistics.fmean(values), std)


def epochs_to(curve: Sequence[tuple[float, float]], threshold: float) -> float:
    """The first epoch of (epoch, accuracy) pairs with at least this accuracy, or infinity."""
    return next((epoch for epoch, value in curve if value >= threshold), math.inf)


class Convergence(NamedTuple):
    """Epochs to a threshold over learning rates, of which some may never get there.

    `mean` and `median` are of the rates that get there, NaN if none does. `censored_mean` takes a
    rate that does not as the number of epochs trained, and so is a lower bound.
    """

    reached: int
    rates: int
    mean: float
    median: float
    best: float
    censored_mean: float


def convergence(epochs: Sequence[float], trained: float) -> Convergence:
    """The epoch rows of Tables 2 to 4.

    Args:
        epochs: for each learning rate, when it gets there; infinity if it does not.
        trained: how many epochs the runs have.

    Examples:
        >>> found = convergence([2.0, 4.0, math.inf], trained=15)
        >>> found.mean, found.censored_mean
        (3.0, 7.0)
    """
    reached = [epoch for epoch in epochs if math.isfinite(epoch)]
    return Convergence(
        reached=len(reached),
        rates=len(epochs),
        mean=statistics.fmean(reached) if reached else math.nan,
        median=statistics.median(reached) if reached else math.nan,
        best=min(reached, default=math.inf),
        censored_mean=statistics.fmean(min(epoch, trained) for epoch in epochs),
    )


class Interval(NamedTuple):
    """A mean and its confidence interval; without one, it and p are NaN."""

    mean: float
    low: float
    high: float
    p: float  # of a mean of 0
    size: int

    @property
    def known(self) -> bool:
        """Whether there were enough values for an interval."""
        return math.isfinite(self.low)

    @property
    def includes_zero(self) -> bool:
        """Whether 0 is in the interval, its ends included."""
        return self.low <= 0.0 <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Student's interval at 95 % of the mean of these values; of differences, a paired one.

    There is none of one value, of equal ones, and of any that is not finite.

    Raises:
        ImportError: without scipy, naming the extra that has it.

    Examples:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> round(found.low, 3), round(found.high, 3), round(found.p, 3)
        (-0.484, 4.484, 0.074)
    """
    mean, count = statistics.fmean(values), len(values)
    known = count > 1 and all(map(math.isfinite, values))
    # of equal values Student's t has no interval: that they agree to the last digit, as accuracies
    # of few examples may, does not say that the next one would
    if not known or max(values) - min(values) <= 1e-12 * max(map(abs, values)):
        return Interval(mean, math.nan, math.nan, math.nan, count)
    try:
        from scipy import stats  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'hf-adalip[experiments]'") from error
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    return Interval(mean, float(low), float(high), float(found.pvalue), count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN stays NaN and does not count.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        adjusted[place] = least
    return adjusted


class Range(NamedTuple):
    """Neighbouring learning rates, and whether the grid ends there: then it may be wider."""

    low: float
    high: float
    open_below: bool
    open_above: bool


def range_near_best(
    values: Mapping[float, float], margin: float, lower: bool = False
) -> tuple[float, Range]:
    """The best learning rate, and those around it, without a gap, within a margin of its value.

    Args:
        values: the measure at each learning rate of the grid.
        margin: how much worse a value may be than the best, its end included.
        lower: whether lower is better.

    Examples:
        >>> range_near_best({0.01: 0.5, 0.1: 0.895, 1.0: 0.9}, margin=0.01)
        (1.0, Range(low=0.1, high=1.0, open_below=False, open_above=True))
    """
    sign = -1.0 if lower else 1.0
    rates = sorted(values)
    best = max(rates, key=lambda rate: sign * values[rate])
    near = [sign * (values[best] - values[rate]) <= margin + 1e-12 for rate in rates]
    first = last = rates.index(best)
    while first > 0 and near[first - 1]:
        first -= 1
    while last + 1 < len(rates) and near[last + 1]:
        last += 1
    return best, Range(rates[first], rates[last], first == 0, last == len(rates) - 1)
