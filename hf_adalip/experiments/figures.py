"""The figures of a report, drawn from a study that was read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..monitor import NORMS, RATES, LayerRateHistory, load_norms
from ..plots import COLOURS, figure_of, plain_ticks
from .report_study import Arm, Metric, StudyResults, Trial, shown
from .study import CONSTANT, RUNS
from .tables import capital, near_best, number, short

INVERSE_SQRT, THEORETICAL_C = "inverse_sqrt", "theoretical_c"
"""The names that studies have for the schedules of Figures 8 and 9."""

Look = tuple[str, str, str]
"""The colour, style and marker of a line."""

_LOOKS: dict[str, Look] = {
    "base": (COLOURS[0], "-", "o"),
    "form": (COLOURS[1], "--", "s"),
    "control": (COLOURS[2], ":", "^"),
}
_STYLES = ("-", "--", ":", "-.")
_TIMES = 12  # lines of a panel over layers, from the first steps to the last
_PANEL = 4.3  # inches


@dataclass
class Picture:
    """A drawn figure, its words for those who do not see it, and what it shows."""

    name: str  # of its file, without the ending
    title: str
    alt: str
    note: str
    figure: Any


@dataclass
class Missing:
    """A figure that cannot be drawn, and why."""

    title: str
    reason: str


@dataclass
class Line:
    """A curve over the epochs: its middle, and the ends of a band around it."""

    label: str
    epochs: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]
    look: Look


def draw(study: StudyResults, schedule: str, arms: Sequence[Arm]) -> list[Picture | Missing]:
    """All figures of one schedule of a study, those that cannot be drawn too."""
    drawn = [over_rates(study, schedule), mean_curves(study, schedule)]
    if schedule == study.schedules[0]:
        drawn += _of_the_study(study, schedule, arms)
    return drawn


_FIGURES = {"mnist": {1, 5}, "cifar10": {1, 5, 8, 9}, "cifar100": {1, 5, 10, 11}}
"""Those that the paper has of each data set, 5 for 6 and 7 too: of others none is missed."""


def _of_the_study(
    study: StudyResults, schedule: str, arms: Sequence[Arm]
) -> list[Picture | Missing]:
    """Figures that are drawn once, whatever schedules there are."""
    figures: dict[int, Callable[[], Picture | Missing]] = {
        5: lambda: layer_rates(study, schedule),
        1: lambda: norms(study, schedule, batch_norm=False),
        10: lambda: norms(study, schedule, batch_norm=True),
        8: lambda: schedules(study),
        9: lambda: theoretical_c(study),
        11: lambda: update_signal(study, arms),
    }
    expected = _FIGURES[study.benchmark.data] if study.benchmark else set(figures)
    found = {figure: make() for figure, make in figures.items()}
    return [
        picture
        for figure, picture in found.items()
        if figure in expected or isinstance(picture, Picture)
    ]


# Curves


def over_rates(study: StudyResults, schedule: str) -> Picture | Missing:
    """The measure over the learning rates, a panel for each pair and one for the peers."""
    title = f"{capital(study.metric.words)} over the learning rate"
    panels: list[tuple[str, list[tuple[Arm, Look]]]] = []
    for pair in study.pairs_with(schedule):
        arms = [(study.arm(role, pair, schedule), look) for role, look in _LOOKS.items()]
        panels.append((f"{shown(pair.form)} and {shown(pair.base)}", arms))
    peers = [arm for arm in study.arms(schedule) if arm.role == "peer"]
    panels.append(("Peers", [(arm, _look(3 + place, place)) for place, arm in enumerate(peers)]))
    known = [
        (name, [(arm, look) for arm, look in arms if arm.medians(study.metric)])
        for name, arms in panels
    ]
    known = [(name, arms) for name, arms in known if arms]
    if not known:
        return Missing(title, "no run has a value")
    figure, places = _panels(len(known))
    for axes, (name, arms) in zip(places, known, strict=True):
        for arm, look in arms:
            _draw_over_rates(axes, arm, study.metric, look)
        axes.set(title=name, xscale="log", xlabel="learning rate")
        plain_ticks(axes.xaxis)
        axes.tick_params(axis="x", labelsize=8)
        _finish(axes, study.metric.words)
    words = " ".join(_words_of_rates(arm, study.metric) for _, arms in known for arm, _ in arms)
    note = (
        "Line: median over the seeds. Band: lowest to highest seed. A control is at the learning "
        "rate of the form that it answers to; it runs at that times the median of S."
    )
    return Picture("over_learning_rates", title, f"{title}. {words}", note, figure)


def _draw_over_rates(axes: Any, arm: Arm, metric: Metric, look: Look) -> None:
    colour, style, marker = look
    values = {rate: arm.values(rate, metric) for rate in arm.medians(metric)}
    seeds = [
        [v for v in found.values() if math.isfinite(v)] or [math.nan] for found in values.values()
    ]
    middle = list(arm.medians(metric).values())
    label = "control" if arm.role == "control" else arm.label
    axes.plot(list(values), middle, color=colour, linestyle=style, marker=marker, label=label)
    low, high = ([end(found) for found in seeds] for end in (min, max))
    axes.fill_between(list(values), low, high, color=colour, alpha=0.15, linewidth=0)


def _words_of_rates(arm: Arm, metric: Metric) -> str:
    medians = arm.medians(metric)
    low, high = (f(medians, key=medians.__getitem__) for f in (min, max))
    ends = (f"{number(medians[rate])} at {rate:g}" for rate in (low, high))
    return f"{arm.label}: from {' to '.join(ends)}."


def mean_curves(study: StudyResults, schedule: str) -> Picture | Missing:
    """Figures 2 to 4: the mean curve over the learning rates, a panel for each pair."""
    paper = study.benchmark.curves if study.benchmark else None
    title = _title("Mean curves over the learning rates", paper or 2, "Figures 2 to 4", paper)
    panels = []
    for pair in study.pairs_with(schedule):
        arms = {role: study.arm(role, pair, schedule) for role in _LOOKS}
        lines = [_mean_curve(arm, study.metric, _LOOKS[role]) for role, arm in arms.items()]
        if found := [line for line in lines if line.epochs]:
            panels.append((f"{shown(pair.form)} and {shown(pair.base)}", found))
    if not panels:
        return Missing(title, "the runs write no numbers for each epoch")
    figure, places = _panels(len(panels))
    for axes, (name, lines) in zip(places, panels, strict=True):
        _draw_lines(axes, lines)
        axes.set(title=name)
        _finish(axes, study.metric.of_epoch.replace("_", " "))
    note = (
        "Line: mean over the learning rates of the mean over the seeds. Band: one standard "
        "deviation over the learning rates to each side, within the values that occur."
    )
    words = " ".join(_words_of_line(line) for _, lines in panels for line in lines)
    return Picture("mean_curves", title, f"{title}. {words}", note, figure)


def _mean_curve(arm: Arm, metric: Metric, look: Look) -> Line:
    """The mean over rates of the mean over seeds; the band is their standard deviation."""
    rates: dict[float, list[float]] = {}
    every: list[float] = []
    for rate in arm.learning_rates:
        for epoch, values in _by_epoch(arm.at(rate), metric).items():
            rates.setdefault(epoch, []).append(statistics.fmean(values))
            every += values
    epochs = sorted(rates)
    middle = [statistics.fmean(rates[epoch]) for epoch in epochs]
    spread = [statistics.pstdev(rates[epoch]) for epoch in epochs]
    ends = zip(middle, spread, strict=True)
    band = [(max(min(every), m - s), min(max(every), m + s)) for m, s in ends]
    return Line(arm.label, epochs, middle, [a for a, _ in band], [b for _, b in band], look)


def _by_epoch(trials: Iterable[Trial], metric: Metric) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for trial in trials:
        for epoch, value in trial.curve(metric):
            found.setdefault(epoch, []).append(value)
    return found


def _seed_curve(label: str, trials: Iterable[Trial], metric: Metric, look: int, style: int) -> Line:
    """The mean over seeds; the band is from the lowest to the highest."""
    values = _by_epoch(trials, metric)
    epochs = sorted(values)
    columns = [values[epoch] for epoch in epochs]
    middle, low, high = ([f(c) for c in columns] for f in (statistics.fmean, min, max))
    return Line(label, epochs, middle, low, high, _look(look, style))


def _look(colour: int, style: int) -> Look:
    return COLOURS[colour % len(COLOURS)], _STYLES[style % 4], "o^sD"[style % 4]


def schedules(study: StudyResults) -> Picture | Missing:
    """Figure 8: a constant learning rate against α/√t."""
    title = _title("A constant learning rate and α/√t", 8)
    return _contrast(study, title, {"constant": CONSTANT, "α/√t": INVERSE_SQRT})


def theoretical_c(study: StudyResults) -> Picture | Missing:
    """Figure 9: c_t of Eq. A.3 against the constant one."""
    title = _title("c_t of Eq. A.3 and a constant", 9)
    return _contrast(study, title, {"constant c": CONSTANT, "theoretical c_t": THEORETICAL_C})


def _contrast(study: StudyResults, title: str, ways: Mapping[str, str]) -> Picture | Missing:
    """What was run with two schedules: a colour for each rate, a line style for each schedule."""
    runs: dict[tuple[str, float], dict[str, list[Trial]]] = {}
    for way, schedule in ways.items():
        for trial in study.trials:
            if trial.schedule == schedule and trial.role != "control" and trial.epochs:
                key = (trial.optimizer, trial.learning_rate)
                runs.setdefault(key, {}).setdefault(way, []).append(trial)
    both = sorted(key for key, found in runs.items() if len(found) == len(ways))
    if not both:
        names = " and ".join(ways.values())
        return Missing(title, f"nothing was run with both schedules, {names}, at one learning rate")
    optimizers = list(dict.fromkeys(optimizer for optimizer, _ in both))
    figure, places = _panels(len(optimizers))
    words = []
    for axes, optimizer in zip(places, optimizers, strict=True):
        rates = [rate for of, rate in both if of == optimizer]
        lines = [
            _seed_curve(
                f"{rate:g}, {kind}", runs[optimizer, rate][kind], study.metric, place, style
            )
            for place, rate in enumerate(rates)
            for style, kind in enumerate(ways)
        ]
        _draw_lines(axes, lines)
        axes.set(title=shown(optimizer))
        _finish(axes, study.metric.of_epoch.replace("_", " "))
        words += [f"{shown(optimizer)} at {_words_of_line(line)}" for line in lines]
    note = "Line: mean over the seeds. Band: lowest to highest seed. Colours: learning rates."
    name = ways[list(ways)[-1]]
    return Picture(name, title, f"{title}. {' '.join(words)}", note, figure)


def update_signal(study: StudyResults, arms: Sequence[Arm]) -> Picture | Missing:
    """Figure 11: AdamLip-U against Adam and AdamLip, each at its best learning rate."""
    title = _title("AdamLip-U against the best Adam and AdamLip", 11)
    lines = []
    for place, name in enumerate(("adam", "adamlip", "adamlipu")):
        own = [a for a in arms if a.optimizer == name and a.role in ("base", "form")]
        for arm in own[:1]:
            if (best := near_best(arm, study.metric)) is not None:
                label = f"{arm.label} at {best[0]:g}"
                lines.append(_seed_curve(label, arm.at(best[0]), study.metric, place, place))
    lines = [line for line in lines if line.epochs]
    if len(lines) < 3:
        return Missing(title, "adam, adamlip and adamlipu do not all have numbers for each epoch")
    figure, (axes,) = _panels(1)
    _draw_lines(axes, lines)
    _finish(axes, study.metric.of_epoch.replace("_", " "))
    note = "Line: mean over the seeds. Band: lowest to highest seed."
    words = " ".join(map(_words_of_line, lines))
    return Picture("update_signal", title, f"{title}. {words}", note, figure)


# Layers


def layer_rates(study: StudyResults, schedule: str) -> Picture | Missing:
    """Figures 5 to 7: the learning rate of every layer, from the first steps to the last."""
    paper = study.benchmark.rates if study.benchmark else None
    title = _title("Learning rates per layer", paper or 5, "Figures 5 to 7", paper)
    panels, seeds = [], set()
    for pair in study.pairs_with(schedule):
        trial = _recorded(study, study.arm("form", pair, schedule), f"{RATES}.json")
        if trial is None:
            continue
        try:
            history = LayerRateHistory.load(_folder(study, trial) / f"{RATES}.json")
        except ValueError:
            return Missing(title, f"{RATES}.json of {trial.folder} cannot be read")
        if not history.steps:
            continue
        seeds.add(trial.seed)
        panels.append((_run_name(trial), history.steps, history.lr, "learning rate A = lr × S"))
    if not panels:
        return Missing(title, f"no run of a form has a {RATES}.json in the study's folder")
    note = f"One run of each, seed {_list(seeds)}. {_TIMES_NOTE} Layers from input to output."
    return _over_layers("layer_learning_rates", title, note, panels, 3)


def norms(study: StudyResults, schedule: str, batch_norm: bool) -> Picture | Missing:
    """Figures 1 and 10: how large each layer's gradient and update are, over the steps."""
    what = "of the BatchNorm layers" if batch_norm else "per layer"
    title = _title(f"Magnitude of gradients and updates {what}", 10 if batch_norm else 1)
    bases = {pair.base: pair for pair in study.pairs_with(schedule)}
    arms = [study.arm("base", pair, schedule) for pair in bases.values()]
    chosen = [_recorded(study, arm, NORMS) for arm in arms]
    trials = [trial for trial in chosen if trial is not None]
    if not trials:
        return Missing(title, f"no run of a base has a {NORMS} in the study's folder")
    panels = []
    for trial in trials:
        try:
            steps, tables = load_norms(_folder(study, trial) / NORMS)
        except ValueError:
            return Missing(title, f"{NORMS} of {trial.folder} cannot be read")
        for name in ("gradient", "update"):
            own = {
                layer: values
                for layer, values in tables[f"{name}_mean_abs"].items()
                if _is_batch_norm(layer) == batch_norm
                and (batch_norm or not layer.endswith(".bias"))  # the paper draws weights alone
            }
            if own and steps:
                panels.append((f"{_run_name(trial)}: {name}", steps, own, f"mean of |{name}|"))
    if not panels:
        return Missing(title, "the runs that recorded norms have no such layers")
    note = (
        "Means of absolute values, over the entries of a layer. One run of each, seed "
        f"{_list(trial.seed for trial in trials)}. {_TIMES_NOTE}"
    )
    return _over_layers("norms_batch_norm" if batch_norm else "norms", title, note, panels, 2)


def _folder(study: StudyResults, trial: Trial) -> Path:
    return study.folder / RUNS / trial.folder


def _run_name(trial: Trial) -> str:
    return f"{shown(trial.optimizer)} at {trial.learning_rate:g}"


def _recorded(study: StudyResults, arm: Arm, file: str) -> Trial | None:
    """Of the runs that wrote this file, the first seed at the learning rate nearest to the best."""
    best = near_best(arm, study.metric)
    trials = [t for t in arm.trials.values() if (_folder(study, t) / file).is_file()]
    if best is None or not trials:
        return None
    return min(trials, key=lambda t: (abs(math.log(t.learning_rate / best[0])), t.seed))


def _is_batch_norm(layer: str) -> bool:
    return any(part.startswith(("bn", "batchnorm", "norm")) for part in layer.lower().split("."))


_TIMES_NOTE = (
    f"Each line is the median over a part of the run, up to {_TIMES} of them from the first steps "
    "(dark) to the last (light)."
)

Panel = tuple[str, Sequence[int], Mapping[str, Sequence[float | None]], str]


def _over_layers(
    name: str, title: str, note: str, panels: Sequence[Panel], columns: int
) -> Picture:
    """Layers to the right, a line for each part of the run, in the colours of its step."""
    import matplotlib
    from matplotlib.colors import Normalize

    layers = max(len(table) for _, _, table, _ in panels)
    figure, places = _panels(len(panels), columns, height=3.4 + 0.06 * min(layers, 30))
    colours = matplotlib.colormaps["viridis"]
    last = max(steps[-1] for _, steps, _, _ in panels)
    norm = Normalize(0, last / 0.92)  # its end is too light for a line
    words = []
    for axes, (label, steps, table, unit) in zip(places, panels, strict=True):
        for step, values in _parts(steps, table):
            axes.plot(range(len(values)), values, color=colours(norm(step)), marker=".", lw=1.2)
        names = [layer.removesuffix(".weight") for layer in table]
        every = math.ceil(len(names) / 24)
        axes.set_xticks(range(0, len(names), every))
        turned = {"rotation": 60, "ha": "right", "fontsize": 8} if len(names) > 6 else {}
        axes.set_xticklabels(names[::every], **turned)
        axes.set(title=label, yscale="log", ylabel=unit)
        plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
        words.append(_words_of_layers(label, table))
    scalar = matplotlib.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(scalar, ax=places, pad=0.01, aspect=40)
    bar.set_label("step")
    bar.ax.set_ylim(0, last)
    return Picture(name, title, f"{title}. {' '.join(words)}", note, figure)


def _parts(
    steps: Sequence[int], table: Mapping[str, Sequence[float | None]]
) -> list[tuple[float, list[float]]]:
    """The run in parts: the middle step of each, and the median of every layer in it."""
    size = math.ceil(len(steps) / _TIMES)
    found = []
    for start in range(0, len(steps), size):
        part = slice(start, start + size)
        columns = [
            [x for x in values[part] if x is not None and x > 0] for values in table.values()
        ]
        medians = [statistics.median(column) if column else math.nan for column in columns]
        found.append((statistics.fmean(steps[part]), medians))
    return found


def _words_of_layers(label: str, table: Mapping[str, Sequence[float | None]]) -> str:
    medians = {
        layer: statistics.median(known)
        for layer, values in table.items()
        if (known := [x for x in values if x is not None])
    }
    if not medians:
        return f"{label}: no values."
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    return (
        f"{label}: medians over the steps from {short(medians[low])} ({low}) to "
        f"{short(medians[high])} ({high}) over {len(medians)} layers."
    )


# What the figures share


def _title(what: str, paper: int, several: str | None = None, own: int | None = None) -> str:
    """What a figure shows, and which of the paper's it is."""
    name = several if several and own is None else f"Figure {own or paper}"
    return f"{what} (as in {name} of the paper)"


def _list(seeds: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(set(seeds))))


def _panels(count: int, columns: int = 3, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure of that many panels, in rows."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = figure_of(max(6.0, _PANEL * columns), height * rows, "")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in places[count:]:
        empty.remove()
    return figure, places[:count]


def _draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    """Curves over the epochs."""
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for line in lines:
        colour, style, marker = line.look
        if len(line.epochs) > 20:
            marker = ""
        axes.plot(
            line.epochs,
            line.middle,
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=4,
            label=line.label,
        )
        axes.fill_between(line.epochs, line.low, line.high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _words_of_line(line: Line) -> str:
    if len(line.epochs) == 1:
        return f"{line.label}: {number(line.middle[0])} at epoch {line.epochs[0]:g}."
    return (
        f"{line.label}: {number(line.middle[0])} at epoch {line.epochs[0]:g}, "
        f"{number(line.middle[-1])} at epoch {line.epochs[-1]:g}."
    )
