"""The tables of a report, as strings, from a study that was read."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .paper import ACCURACY_ROWS, EPOCH_ROWS, OPTIMIZERS, Row
from .report_study import Arm, Metric, StudyResults, shown
from .statistics import (
    Convergence,
    Interval,
    Range,
    convergence,
    epochs_to,
    holm,
    interval,
    range_near_best,
    spread,
)
from .study import Pair

NONE = "–"
CONTROL = "Control of a form: its base at lr × the median of S in the form's runs at that lr."
LEFT_OUT = "A seed of which one of the two runs is missing, failed or ∞ is left out."
MARGIN = 0.01
"""How far from the best a learning rate may be: a point of accuracy, or 1 % of a loss."""


@dataclass
class Table:
    """Cells as text. A column's head is (group, name); neighbours of one group share its head."""

    title: str
    head: list[tuple[str, str]]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def capital(text: str) -> str:
    """The text with its first letter a capital."""
    return text[:1].upper() + text[1:]


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number with that many digits, a dash if there is none, with a typographic minus."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def short(value: float | None) -> str:
    """A number with at most four digits."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4g}"


def change(found: Interval) -> str:
    """A difference and its interval."""
    if not found.known:
        return f"{number(found.mean, 4, '+')} (no interval)"
    return f"{number(found.mean, 4, '+')} ({_ends(found)})"


def _ends(found: Interval) -> str:
    return f"{number(found.low, 4, '+')} to {number(found.high, 4, '+')}"


def p_value(p: float) -> str:
    """A p-value with three digits."""
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


# Runs


def outcomes(arm: Arm, seeds: int) -> Counter[str]:
    """How many runs are complete, diverged, failed and missing."""
    found = Counter(trial.outcome for trial in arm.trials.values())
    found["missing"] = max(0, seeds * len(arm.learning_rates) - len(arm.trials))
    return found


def runs_table(study: StudyResults, arms: Sequence[Arm]) -> Table:
    """How every run ended."""
    kinds = ("complete", "diverged", "failed", "missing")
    rows = []
    for arm in arms:
        found = outcomes(arm, len(study.seeds))
        rows.append([arm.label, *(str(found[kind]) for kind in kinds)])
    return Table(
        "Runs",
        [("", name) for name in ("optimizer", *kinds)],
        rows,
        [
            "Diverged: it ran, and a loss at its end is not finite; a peak that it reached "
            "before counts in every table. Failed: it ended with an error, has no number, and is "
            "in no other table."
        ],
    )


# Tables 2 to 5


def threshold(study: StudyResults) -> float:
    """The share of the maximum peak at which a run has converged."""
    return study.benchmark.threshold if study.benchmark else 0.95


@dataclass(frozen=True)
class Target:
    """The accuracy that counts as converged, and how many epochs there were to get to it."""

    accuracy: float
    epochs: float


def target(study: StudyResults, arms: Sequence[Arm]) -> Target | None:
    """A share of the maximum peak of the runs of bases and forms, whatever else was run.

    None for a loss, and without an accuracy for each epoch.
    """
    own = [arm for arm in arms if arm.role in ("base", "form")] or arms
    runs = [trial for arm in own for trial in arm.trials.values()]
    points = [point for trial in runs for point in trial.curve(study.metric)]
    if study.metric.lower or not points:
        return None
    peak = max(value for _, value in points)
    return Target(threshold(study) * peak, max(epoch for epoch, _ in points))


def epochs_to_target(arm: Arm, metric: Metric, target: Target) -> Convergence | None:
    """For each learning rate the median over the seeds; a run that does not get there takes
    forever."""
    medians = [
        statistics.median(epochs_to(trial.curve(metric), target.accuracy) for trial in runs)
        for rate in arm.learning_rates
        if (runs := [trial for trial in arm.at(rate) if trial.epochs])
    ]
    return convergence(medians, target.epochs) if medians else None


def paper_tables(study: StudyResults, arms: Sequence[Arm], printed: bool) -> list[Table]:
    """Tables 2 to 4: one for the paper's six, beside its numbers, and one for what it has not.

    Args:
        study: where the arms are from.
        arms: of one schedule.
        printed: whether the paper's numbers are for this schedule.
    """
    with_values = [arm for arm in arms if arm.medians(study.metric)]
    goal = target(study, with_values)
    benchmark = study.benchmark if printed else None
    if benchmark is None:
        title = f"Over the learning rates: {study.metric.words}"
        return [_paper_table(study, title, with_values, goal, {})]
    six = [
        arm
        for name in OPTIMIZERS
        for arm in with_values
        if arm.optimizer == name and arm.role in ("base", "form")
    ]
    six = list({arm.optimizer: arm for arm in reversed(six)}.values())[::-1]
    others = [arm for arm in with_values if arm not in six]
    title = f"Table {benchmark.table} of the paper"
    columns = benchmark.printed()
    found = [_paper_table(study, title, six, goal, columns)] if six else []
    if others:
        title = f"Table {benchmark.table}, of what the paper does not have"
        found.append(_paper_table(study, title, others, goal, {}))
    return found


def _paper_table(
    study: StudyResults,
    title: str,
    arms: Sequence[Arm],
    goal: Target | None,
    printed: Mapping[str, tuple[Row, Row]],
) -> Table:
    lower, name = study.metric.lower, study.metric.words
    labels = [f"{name}, {row.lower()}" for row in ACCURACY_ROWS]
    if lower:
        labels[0] = f"{name}, min"
    head = [("", "over learning rates")]
    columns: list[list[str]] = []
    extra = ["epochs, mean with the others at the last", "rates that get there"]
    for arm in arms:
        values = spread(list(arm.medians(study.metric).values()), lower)
        ours = [number(value) for value in (values.best, values.median, values.mean, values.std)]
        if goal:
            ours += _epoch_cells(epochs_to_target(arm, study.metric, goal))
        columns.append(ours)
        head.append((arm.label, "here" if arm.optimizer in printed else ""))
        if arm.optimizer in printed:
            accuracy, convergence = printed[arm.optimizer]
            columns.append([*accuracy, *((*convergence, "", "") if goal else ())])
            head.append((arm.label, "paper"))
    if goal:
        labels += [f"epochs, {row.lower()}" for row in EPOCH_ROWS] + extra
    rows = [[label, *cells] for label, *cells in zip(labels, *columns, strict=True)]
    return Table(title, head, rows, _paper_notes(study, name, goal, arms, bool(printed)))


def _epoch_cells(found: Convergence | None) -> list[str]:
    if found is None:
        return [NONE] * 5
    bound = "≥ " if found.reached < found.rates else ""
    return [
        *(short(value) for value in (found.mean, found.median, found.best)),
        bound + short(found.censored_mean),
        f"{found.reached} of {found.rates}",
    ]


def _paper_notes(
    study: StudyResults, name: str, goal: Target | None, arms: Sequence[Arm], printed: bool
) -> list[str]:
    notes = [CONTROL] if any(arm.role == "control" for arm in arms) else []
    notes += [
        f"For each learning rate the median over the seeds of each run's {name}; then "
        f"{'min' if study.metric.lower else 'max'}, median, "
        "mean and standard deviation (of the population) over the learning rates."
    ]
    if goal is None:
        notes.append("No epochs of convergence: the runs write no accuracy for each epoch.")
    else:
        never = [_never(arm, study.metric, goal) for arm in arms]
        runs = "; ".join(f"{arm.label} {text}" for arm, text in zip(arms, never, strict=True))
        notes.append(
            f"Epochs to {goal.accuracy:.4f}, {100 * threshold(study):g} % of the maximum peak of "
            "all runs of a base optimizer or a form. For each learning rate the median over the "
            "seeds, a run that does not get there counting as never. Mean, median and best are of "
            "the learning rates that get there; the row below counts the others as the last "
            f"epoch, a lower bound. Runs that do not get there: {runs}."
        )
        if printed:
            notes.append(
                "The paper does not say what it does with learning rates that do not get there."
            )
    return notes


def _never(arm: Arm, metric: Metric, goal: Target) -> str:
    curves = [trial.curve(metric) for trial in arm.trials.values() if trial.epochs]
    never = sum(math.isinf(epochs_to(curve, goal.accuracy)) for curve in curves)
    return f"{never} of {len(curves)}"


TEST = Metric("best_eval_accuracy")


def test_table(study: StudyResults, arms: Sequence[Arm], printed: bool) -> Table | None:
    """Table 5: for each rate the mean over seeds of the maximum test accuracy, then the best."""
    benchmark = study.benchmark if printed else None
    paper = dict(zip(OPTIMIZERS, benchmark.test, strict=True)) if benchmark else {}
    rows = []
    for arm in arms:
        means = _means(arm, TEST)
        if not means:
            continue
        best = max(means, key=lambda rate: means[rate])
        found = interval(list(arm.values(best, TEST).values()))
        own = arm.role in ("base", "form")
        cells = [arm.label, number(found.mean, 4), _plus_minus(found), f"{best:g}"]
        rows.append([*cells, *([paper.get(arm.optimizer, "") if own else ""] if paper else ())])
    names = [
        "optimizer",
        "test accuracy" if paper else "accuracy",
        "95 % interval",
        "at learning rate",
    ]
    names += ["paper"] if paper else []
    if not rows or study.metric.of_epoch == TEST.of_epoch:
        return None
    return Table(
        "Table 5 of the paper" if paper else "Evaluation accuracy",
        [("", name) for name in names],
        rows,
        [
            "Mean over the seeds of each run's maximum accuracy on the data that it was evaluated "
            "on, at the learning rate where that is highest. Epoch and learning rate are chosen "
            "on the same data, as in the paper."
        ],
    )


def _means(arm: Arm, metric: Metric) -> dict[float, float]:
    found = {rate: arm.values(rate, metric) for rate in arm.learning_rates}
    return {rate: statistics.fmean(v.values()) for rate, v in found.items() if v}


def _plus_minus(found: Interval) -> str:
    if not found.known:
        return NONE
    return f"{number(found.low, 4)} to {number(found.high, 4)}"


# What the paper leaves out


def margin(metric: Metric, best: float) -> float:
    """How far from the best value a learning rate may be to count as near it."""
    return MARGIN * abs(best) if metric.lower else MARGIN


def near_best(arm: Arm, metric: Metric) -> tuple[float, Range] | None:
    """The arm's best learning rate and those near it, None if it has no value."""
    medians = arm.medians(metric)
    if not medians:
        return None
    return range_near_best(medians, margin(metric, metric.best(medians.values())), metric.lower)


def width(found: Range) -> str:
    """A range of learning rates and the factor between its ends, a bound if the grid ends there."""
    if found.low == found.high and found.open_below and found.open_above:
        return f"{found.low:g}, the only one"
    text = f"{found.low:g} to {found.high:g}, × {found.high / found.low:.3g}"
    if found.low == found.high:
        text = f"{found.low:g} alone, × 1"
    sides = (("low", found.open_below), ("high", found.open_above))
    ends = " and ".join(side for side, is_open in sides if is_open)
    return f"{text} or more ({ends} end of the grid)" if ends else text


def arms_table(study: StudyResults, arms: Sequence[Arm]) -> Table:
    """Each arm at its best learning rate, how wide the good rates are, and S."""
    rows = []
    for arm in arms:
        if (found := near_best(arm, study.metric)) is None:
            continue
        best, near = found
        values = list(arm.values(best, study.metric).values())
        scales = arm.median_scale(arm.learning_rates)
        rows.append(
            [
                arm.label,
                f"{best:g}",
                number(statistics.median(values), 4),
                number(statistics.fmean(values), 4),
                _plus_minus(interval(values)),
                width(near),
                number(scales, 2),
            ]
        )
    nearness = "1 % of it" if study.metric.lower else "1 point of it"
    names = ["optimizer", "best lr", "median", "mean", "95 % interval", f"rates within {nearness}"]
    return Table(
        f"At the best learning rate: {study.metric.words}",
        [("", name) for name in [*names, "median S"]],
        rows,
        [
            "The best learning rate is that with the best median over the seeds, chosen on the "
            "same runs. Rates near it: neighbours in the grid, without a gap. Median S: over "
            "all learning rates, of each run's median over layers and steps."
        ],
    )


@dataclass(frozen=True)
class Comparison:
    """What one arm has more than another, paired by seed."""

    what: str
    at: str
    found: Interval
    pairs: int
    possible: int


def over_rates(form: Arm, other: Arm, metric: Metric, seeds: Sequence[int]) -> Comparison | None:
    """The difference at equal rates, its mean over the rates for each seed.

    All seeds must have the same rates to be compared, so rates or seeds that others lack are left
    out; of the ways to do that, the one that keeps the most.
    """
    rates: dict[int, dict[float, float]] = {}  # of each seed, the differences
    for rate in form.learning_rates:
        found = _differences(form.values(rate, metric), other.values(rate, metric))
        for seed, difference in found.items():
            rates.setdefault(seed, {})[rate] = difference
    if not rates:
        return None
    order = sorted(rates, key=lambda seed: (-len(rates[seed]), seed))
    ways = [
        (order[:count], set.intersection(*(set(rates[seed]) for seed in order[:count])))
        for count in range(1, len(order) + 1)
    ]
    chosen, common = max(ways, key=lambda way: (len(way[0]) * len(way[1]), len(way[0])))
    by_seed = [statistics.fmean(rates[seed][r] for r in common) for seed in sorted(chosen)]
    total = len(form.learning_rates)
    count = str(total) if len(common) == total else f"{len(common)} of {total}"
    return Comparison(
        what=_minus(form, other),
        at=f"mean over {count} learning rate{'' if total == 1 else 's'}",
        found=interval(by_seed),
        pairs=len(chosen) * len(common),
        possible=len(seeds) * total,
    )


def _differences(mine: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    """Of the seeds that have both; a loss that is infinite has no difference from another."""
    found = {seed: mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())}
    return {seed: difference for seed, difference in found.items() if math.isfinite(difference)}


def _minus(form: Arm, other: Arm) -> str:
    return f"{form.label} − {'its control' if other.role == 'control' else other.label}"


def at_best(form: Arm, other: Arm, metric: Metric, seeds: Sequence[int]) -> Comparison | None:
    """The difference with each at its own best learning rate."""
    mine, others = near_best(form, metric), near_best(other, metric)
    if mine is None or others is None:
        return None
    found = _differences(form.values(mine[0], metric), other.values(others[0], metric))
    if not found:
        return None
    at = f"best of each, {mine[0]:g} and {others[0]:g}"
    differences = interval(list(found.values()))
    return Comparison(_minus(form, other), at, differences, len(found), len(seeds))


def pair_comparisons(study: StudyResults, schedule: str) -> list[Comparison]:
    """Every form against its base and its control: over the rates, and at the best."""
    found = []
    for pair in study.pairs_with(schedule):
        form = study.arm("form", pair, schedule)
        for role in ("base", "control"):
            other = study.arm(role, pair, schedule)
            for compare in (over_rates, at_best):
                found.append(compare(form, other, study.metric, study.seeds))
    return [comparison for comparison in found if comparison is not None]


def pair_sentences(study: StudyResults, schedule: str) -> list[str]:
    """For each pair the interval over the rates and whether it includes 0, against base and
    control."""
    found = []
    for pair in study.pairs_with(schedule):
        form = study.arm("form", pair, schedule)
        if form.trials:
            others = [study.arm(role, pair, schedule) for role in ("base", "control")]
            clauses = [_clause(form, other, study) for other in others]
            found.append(f"{'; '.join(clauses)}.")
    return found


def _clause(form: Arm, other: Arm, study: StudyResults) -> str:
    comparison = over_rates(form, other, study.metric, study.seeds)
    if comparison is None:
        return f"{_minus(form, other)}: no learning rate has runs of both"
    found = comparison.found
    begin = f"{comparison.what}, {comparison.at}, {number(found.mean, 4, '+')}"
    if not found.known:
        why = "one seed has" if found.size == 1 else "equal differences have"
        return f"{begin}, and {why} no interval"
    zero = "includes 0" if found.includes_zero else "does not include 0"
    return f"{begin}, 95 % interval {_ends(found)} from {found.size} seeds, which {zero}"


def peer_comparisons(study: StudyResults, arms: Sequence[Arm]) -> list[Comparison]:
    """Every form against every peer, or without forms the peers, each at its best learning rate."""
    forms, peers = ([arm for arm in arms if arm.role == role] for role in ("form", "peer"))
    both = itertools.product(forms, peers) if forms else itertools.combinations(peers, 2)
    found = [at_best(one, other, study.metric, study.seeds) for one, other in both]
    return [comparison for comparison in found if comparison is not None]


def comparison_table(study: StudyResults, title: str, comparisons: Sequence[Comparison]) -> Table:
    """Differences with their intervals and p-values, corrected for how many there are."""
    adjusted = holm([comparison.found.p for comparison in comparisons])
    known = sum(not math.isnan(p) for p in adjusted)
    rows = [
        [c.what, c.at, change(c.found), _zero(c.found), p_value(p), f"{c.pairs} of {c.possible}"]
        for c, p in zip(comparisons, adjusted, strict=True)
    ]
    better = "Negative" if study.metric.lower else "Positive"
    names = ["difference", "learning rates", "mean (95 % interval)", "includes 0", "p (Holm)"]
    names.append("pairs of runs")
    return Table(
        title,
        [("", name) for name in names],
        rows,
        [
            f"Of {study.metric.words}, paired by seed, Student's t. {better} is better "
            "for the first. p of no difference, after Holm's correction for the "
            f"{known} comparisons of this table; the intervals are not corrected. "
            f"{LEFT_OUT} At the best learning rates the choice was made on "
            "the same runs, which the interval does not know of."
        ],
    )


def _zero(found: Interval) -> str:
    return ("yes" if found.includes_zero else "no") if found.known else NONE


def rate_table(study: StudyResults, pair: Pair, schedule: str) -> Table | None:
    """A pair at each learning rate: base, form and control, and what S changes."""
    arms = {role: study.arm(role, pair, schedule) for role in ("base", "form", "control")}
    if not any(arm.medians(study.metric) for arm in arms.values()):
        return None
    medians = {role: arm.medians(study.metric) for role, arm in arms.items()}
    changes = {
        (rate, role): _at_rate(arms["form"], arms[role], rate, study.metric)
        for rate in pair.learning_rates
        for role in ("base", "control")
    }
    adjusted = dict(zip(changes, holm([found.p for found in changes.values()]), strict=True))
    rows = []
    for rate in pair.learning_rates:
        cells = [f"{rate:g}", *(number(medians[role].get(rate), 4) for role in arms)]
        cells.append(number(arms["form"].median_scale([rate]), 2))
        for role in ("base", "control"):
            found = changes[rate, role]
            cells += [change(found) if found.size else NONE, p_value(adjusted[rate, role])]
        cells.append(_not_complete(arms.values(), rate, len(study.seeds)))
        rows.append(cells)
    form, base = shown(pair.form), shown(pair.base)
    names = ["lr", base, form, "control", "median S"]
    names += [f"{form} − {base}", "p", f"{form} − control", "p", "not complete"]
    known = sum(not math.isnan(p) for p in adjusted.values())
    return Table(
        f"{form} and {base} at each learning rate: {study.metric.words}",
        [("", name) for name in names],
        rows,
        [
            f"Medians over the seeds. Control: {base} at lr × the median of S in the runs of "
            f"{form} at that lr. Differences: mean and 95 % interval, paired by seed. "
            f"{LEFT_OUT} p after Holm's correction for {known} comparisons."
        ],
    )


def _at_rate(form: Arm, other: Arm, rate: float, metric: Metric) -> Interval:
    found = _differences(form.values(rate, metric), other.values(rate, metric))
    if not found:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0)
    return interval(list(found.values()))


def _not_complete(arms: Iterable[Arm], rate: float, seeds: int) -> str:
    counts: Counter[str] = Counter()
    for arm in arms:
        runs = arm.at(rate)
        counts.update(trial.outcome for trial in runs if trial.outcome != "complete")
        if arm.trials:
            counts["missing"] += max(0, seeds - len(runs))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count) or "0"
