"""The measures of a study against closed forms and scipy."""

import math
import random

import pytest

from hf_adalip.experiments.statistics import (
    convergence,
    epochs_to,
    holm,
    interval,
    range_near_best,
    spread,
)

pytest.importorskip("scipy")


def test_spread_is_the_papers_four_rows() -> None:
    found = spread([0.92, 0.98, 0.10])
    assert found.best == 0.98
    assert found.median == 0.92
    assert found.mean == pytest.approx(2.0 / 3.0)
    mean = 2.0 / 3.0
    variance = sum((x - mean) ** 2 for x in (0.92, 0.98, 0.10)) / 3  # of the population
    assert found.std == pytest.approx(math.sqrt(variance))
    assert spread([2.0, 3.0], lower=True).best == 2.0


def test_the_papers_standard_deviation_is_the_populations() -> None:
    """SGD on MNIST: of the eight values that the other rows allow, those nearest to their mean."""
    rest = (8 * 0.663 - 4 * 0.976 - 1.0) / 3  # three rates at chance
    values = [rest] * 3 + [0.976] * 4 + [1.0]
    least = spread(values)
    assert least.median == 0.976
    assert least.mean == pytest.approx(0.663)
    assert least.std < 0.422 < least.std * math.sqrt(8 / 7)


def test_interval_of_differences_is_the_paired_t_interval() -> None:
    from scipy import stats

    draw = random.Random(0)
    left = [draw.gauss(0.9, 0.01) for _ in range(7)]
    right = [draw.gauss(0.89, 0.01) for _ in range(7)]
    found = interval([a - b for a, b in zip(left, right, strict=True)])
    expected = stats.ttest_rel(left, right)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, expected.pvalue))
    assert found.size == 7


def test_interval_of_two_and_three_values_by_hand() -> None:
    two = interval([1.0, 3.0])
    assert two.high - two.mean == pytest.approx(12.7062047)  # t of 1 degree of freedom × 1
    assert two.includes_zero
    three = interval([1.0, 2.0, 3.0])
    assert three.high - three.mean == pytest.approx(4.30265273 / math.sqrt(3))


@pytest.mark.parametrize("values", [[0.0] * 3, [0.5] * 3, [0.9 - 0.8, 0.5 - 0.4, 0.3 - 0.2]])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    """The last ones differ by rounding alone."""
    found = interval(values)
    assert found.mean == pytest.approx(values[0])
    assert not found.known
    assert math.isnan(found.p)


def test_one_value_has_no_interval() -> None:
    found = interval([0.3])
    assert found.mean == 0.3
    assert not found.known


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    with_none = holm([0.02, math.nan, 0.03])
    assert with_none[0] == pytest.approx(0.04)
    assert math.isnan(with_none[1])
    assert with_none[2] == pytest.approx(0.04)


def test_epochs_to_a_threshold() -> None:
    curve = [(1.0, 0.5), (2.0, 0.98), (3.0, 0.7)]
    assert epochs_to(curve, 0.98) == 2.0
    assert epochs_to(curve, 0.99) == math.inf
    assert epochs_to([], 0.1) == math.inf


def test_convergence_counts_what_does_not_get_there() -> None:
    found = convergence([math.inf, 2.0, 1.0, math.inf], trained=4)
    assert (found.reached, found.rates) == (2, 4)
    assert (found.mean, found.median, found.best) == (1.5, 1.5, 1.0)
    assert found.censored_mean == (4 + 2 + 1 + 4) / 4
    none = convergence([math.inf], trained=4)
    assert math.isnan(none.mean)
    assert (none.censored_mean, none.best) == (4.0, math.inf)


def test_range_near_the_best_has_no_gap_and_says_where_the_grid_ends() -> None:
    values = {0.001: 0.95, 0.01: 0.90, 0.1: 0.945, 1.0: 0.95, 10.0: 0.2}
    best, found = range_near_best(values, 0.01)
    assert best == 0.001
    assert found == (0.001, 0.001, True, False)
    values[0.001] = 0.94
    best, found = range_near_best(values, 0.01)
    assert (best, found) == (1.0, (0.1, 1.0, False, False))
    best, found = range_near_best({1.0: 2.0, 2.0: 2.015}, 0.02, lower=True)
    assert (best, found) == (1.0, (1.0, 2.0, True, True))
