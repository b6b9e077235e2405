"""The figures of a report, drawn from a study that was read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import RESULTS
from ..monitor import RATES, LayerRateHistory
from ..plots import COLOURS, figure_of, plain_ticks
from .report_study import CONSTANT, Arm, Study, Trial, shown
from .tables import capital, measure_name, near_best, number, short

RECORDS = "records.json"
INVERSE_SQRT = "inverse_sqrt"
THEORETICAL = "c=theoretical"

_LOOKS = {
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
    look: tuple[str, str, str]


def draw(study: Study, schedule: str, arms: Sequence[Arm]) -> list[Picture | Missing]:
    """All figures of one schedule of a study, those that cannot be drawn too."""
    drawn = [over_rates(study, schedule), mean_curves(study, schedule)]
    if schedule == study.schedules[0]:
        drawn += _of_the_study(study, schedule, arms)
    return drawn


_FIGURES = {"mnist": (1, 5), "cifar10": (1, 6, 8, 9), "cifar100": (1, 7, 10, 11)}
"""Which of the figures that are drawn once the paper has, for each of its data sets."""


def _of_the_study(study: Study, schedule: str, arms: Sequence[Arm]) -> list[Picture | Missing]:
    """Figures that are drawn once, whatever schedules there are."""
    runs, damaged = recordings(study.folder)
    figures: dict[int, Callable[[], Picture | Missing]] = {
        5: lambda: layer_rates(study, runs),
        1: lambda: norms(study, runs, batch_norm=False),
        10: lambda: norms(study, runs, batch_norm=True),
        8: lambda: schedules(study),
        9: lambda: theoretical_c(study, schedule),
        11: lambda: update_signal(study, arms),
    }
    wanted = set(figures)
    if study.benchmark:
        wanted = set(_FIGURES[study.name.removeprefix("paper_")])
        wanted = {5 if figure in (6, 7) else figure for figure in wanted}
    return [make() for figure, make in figures.items() if figure in wanted] + damaged


# Curves


def over_rates(study: Study, schedule: str) -> Picture | Missing:
    """The measure over the learning rates, a panel for each pair."""
    title = f"{capital(measure_name(study.metric))} over the learning rate"
    panels, words = [], []
    for pair in study.pairs:
        arms = {role: study.arm(role, pair, schedule) for role in _LOOKS}
        arms = {role: arm for role, arm in arms.items() if arm.medians(study.metric)}
        if arms:
            panels.append((f"{shown(pair.form)} and {shown(pair.base)}", arms))
            words += [_words_of_rates(arm, study.metric) for arm in arms.values()]
    if not panels:
        return Missing(title, "no run has a value")
    figure, places = _panels(len(panels))
    for axes, (name, arms) in zip(places, panels, strict=True):
        for role, arm in arms.items():
            colour, style, marker = _LOOKS[role]
            values = {rate: arm.values(rate, study.metric).values() for rate in arm.learning_rates}
            values = {rate: found for rate, found in values.items() if found}
            rates = list(values)
            label = "control" if role == "control" else arm.label
            middle = [statistics.median(found) for found in values.values()]
            axes.plot(rates, middle, color=colour, linestyle=style, marker=marker, label=label)
            low, high = ([f(found) for found in values.values()] for f in (min, max))
            axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=name, xscale="log", xlabel="learning rate")
        plain_ticks(axes.xaxis)
        axes.tick_params(axis="x", labelsize=8)
        _finish(axes, measure_name(study.metric))
    note = (
        "Line: median over the seeds. Band: lowest to highest seed. A control is at the learning "
        "rate of the form that it answers to; it runs at that times the median of S."
    )
    return Picture("over_learning_rates", title, f"{title}. {' '.join(words)}", note, figure)


def _words_of_rates(arm: Arm, metric: str) -> str:
    medians = arm.medians(metric)
    low, high = (f(medians, key=medians.__getitem__) for f in (min, max))
    ends = (f"{number(medians[rate])} at {rate:g}" for rate in (low, high))
    return f"{arm.label}: from {' to '.join(ends)}."


def mean_curves(study: Study, schedule: str) -> Picture | Missing:
    """Figures 2 to 4: the mean curve over the learning rates, a panel for each pair."""
    own_number = study.benchmark.curves if study.benchmark else None
    title = _title(
        "Mean curves over the learning rates", own_number or 2, "Figures 2 to 4", own_number
    )
    metric = study.metric.removeprefix("best_")
    panels = []
    for pair in study.pairs:
        arms = {role: study.arm(role, pair, schedule) for role in _LOOKS}
        lines = [_mean_curve(arm, metric, _LOOKS[role]) for role, arm in arms.items()]
        if found := [line for line in lines if line.epochs]:
            panels.append((f"{shown(pair.form)} and {shown(pair.base)}", found))
    if not panels:
        return Missing(title, "the runs write no numbers for each epoch")
    figure, places = _panels(len(panels))
    for axes, (name, lines) in zip(places, panels, strict=True):
        _draw_lines(axes, lines)
        axes.set(title=name)
        _finish(axes, metric.replace("_", " "))
    note = (
        "Line: mean over the learning rates of the mean over the seeds. Band: one standard "
        "deviation over the learning rates to each side, within the values that occur."
    )
    words = " ".join(_words_of_line(line) for _, lines in panels for line in lines)
    return Picture("mean_curves", title, f"{title}. {words}", note, figure)


def _mean_curve(arm: Arm, metric: str, look: tuple[str, str, str]) -> Line:
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


def _by_epoch(trials: Iterable[Trial], metric: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for trial in trials:
        for epoch, value in trial.curve(metric):
            found.setdefault(epoch, []).append(value)
    return found


def _seed_curve(label: str, trials: Iterable[Trial], metric: str, look: int, style: int) -> Line:
    """The mean over seeds; the band is from the lowest to the highest."""
    values = _by_epoch(trials, metric)
    epochs = sorted(values)
    columns = [values[epoch] for epoch in epochs]
    middle, low, high = ([f(c) for c in columns] for f in (statistics.fmean, min, max))
    colour = COLOURS[look % len(COLOURS)]
    return Line(label, epochs, middle, low, high, (colour, _STYLES[style % 4], "o^sD"[style % 4]))


def schedules(study: Study) -> Picture | Missing:
    """Figure 8: a constant learning rate against α/√t."""
    title = _title("A constant learning rate and α/√t", 8)
    found = {
        schedule: [t for t in study.trials if t.role == "form" and t.schedule == schedule]
        for schedule in (CONSTANT, INVERSE_SQRT)
    }
    if not all(found.values()):
        return Missing(title, f"no form was run with both schedules, {CONSTANT} and {INVERSE_SQRT}")
    names = {CONSTANT: "constant", INVERSE_SQRT: "α/√t"}
    return _contrast(study, title, "schedules", {names[key]: runs for key, runs in found.items()})


def theoretical_c(study: Study, schedule: str) -> Picture | Missing:
    """Figure 9: c_t of Eq. A.3 against the constant one."""
    title = _title("c_t of Eq. A.3 and a constant", 9)
    forms = [t for t in study.trials if t.role == "form" and t.schedule == schedule]
    found = {
        "theoretical c_t": [trial for trial in forms if trial.variant == THEORETICAL],
        "constant c": [trial for trial in forms if not trial.variant],
    }
    if not all(found.values()):
        return Missing(title, "no form was run with both, c=theoretical and a constant c")
    return _contrast(study, title, "theoretical_c", found)


def _contrast(
    study: Study, title: str, name: str, kinds: Mapping[str, Sequence[Trial]]
) -> Picture | Missing:
    """Curves of what was run in both ways: a colour for each rate, a line style for each way."""
    metric = study.metric.removeprefix("best_")
    runs: dict[tuple[str, float], dict[str, list[Trial]]] = {}
    for kind, trials in kinds.items():
        for trial in trials:
            if trial.curve(metric):
                key = (trial.optimizer, trial.learning_rate)
                runs.setdefault(key, {}).setdefault(kind, []).append(trial)
    both = sorted(key for key, found in runs.items() if len(found) == len(kinds))
    if not both:
        return Missing(title, "no learning rate has numbers for each epoch in both ways")
    optimizers = list(dict.fromkeys(optimizer for optimizer, _ in both))
    figure, places = _panels(len(optimizers))
    words = []
    for axes, optimizer in zip(places, optimizers, strict=True):
        rates = [rate for of, rate in both if of == optimizer]
        lines = [
            _seed_curve(f"{rate:g}, {kind}", runs[optimizer, rate][kind], metric, place, style)
            for place, rate in enumerate(rates)
            for style, kind in enumerate(kinds)
        ]
        _draw_lines(axes, lines)
        axes.set(title=shown(optimizer))
        _finish(axes, metric.replace("_", " "))
        words += [f"{shown(optimizer)} at {_words_of_line(line)}" for line in lines]
    note = "Line: mean over the seeds. Band: lowest to highest seed. Colours: learning rates."
    return Picture(name, title, f"{title}. {' '.join(words)}", note, figure)


def update_signal(study: Study, arms: Sequence[Arm]) -> Picture | Missing:
    """Figure 11: AdamLip-U against Adam and AdamLip, each at its best learning rate."""
    title = _title("AdamLip-U against the best Adam and AdamLip", 11)
    metric = study.metric.removeprefix("best_")
    lines = []
    for place, name in enumerate(("adam", "adamlip", "adamlipu")):
        own = [a for a in arms if a.optimizer == name and a.role in ("base", "form")]
        for arm in own[:1]:
            if (best := near_best(arm, study.metric)) is not None:
                label = f"{arm.label} at {best[0]:g}"
                lines.append(_seed_curve(label, arm.at(best[0]), metric, place, place))
    lines = [line for line in lines if line.epochs]
    if len(lines) < 3:
        return Missing(title, "adam, adamlip and adamlipu do not all have numbers for each epoch")
    figure, (axes,) = _panels(1)
    _draw_lines(axes, lines)
    _finish(axes, metric.replace("_", " "))
    note = "Line: mean over the seeds. Band: lowest to highest seed."
    words = " ".join(map(_words_of_line, lines))
    return Picture("update_signal", title, f"{title}. {words}", note, figure)


# Layers


@dataclass
class Recording:
    """What a run wrote of its layers."""

    folder: Path
    optimizer: str
    learning_rate: float
    seed: int
    schedule: str
    rates: LayerRateHistory | None = None
    steps: list[int] = field(default_factory=list)
    norms: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Which run it is."""
        return f"{shown(self.optimizer)} at {self.learning_rate:g}"


def recordings(folder: Path) -> tuple[list[Recording], list[Missing]]:
    """The runs of a study that recorded their layers, and those whose files cannot be read."""
    found, damaged = [], []
    for results in sorted(folder.glob(f"runs/**/{RESULTS}")):
        run = results.parent
        if not any((run / name).is_file() for name in (f"{RATES}.json", RECORDS)):
            continue
        try:
            found.append(_recording(run, json.loads(results.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            reason = "its records or results cannot be read"
            damaged.append(Missing(f"The layers of {run.relative_to(folder)}", reason))
    return found, damaged


def _recording(run: Path, settings: Mapping[str, Any]) -> Recording:
    recording = Recording(
        run,
        str(settings["optimizer"]),
        float(settings["learning_rate"]),
        int(settings["seed"]),
        str(settings.get("lr_scheduler_type") or CONSTANT),
    )
    if (path := run / f"{RATES}.json").is_file():
        recording.rates = LayerRateHistory.load(path)
    if (path := run / RECORDS).is_file():
        recording.steps, recording.norms = read_norms(path)
    return recording


NORMS = ("weight_norm", "gradient_norm", "update_norm")


def read_norms(path: Path) -> tuple[list[int], dict[str, dict[str, list[float | None]]]]:
    """The steps that a run recorded, and for each of NORMS the values of every layer.

    Raises:
        ValueError: if the file is not such a record, naming it.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    steps, norms = data["steps"], {name: data[name] for name in NORMS if name in data}
    for table in norms.values():
        if any(len(column) != len(steps) for column in table.values()):
            raise ValueError(f"{path} has columns of different lengths")
    return steps, norms


def layer_rates(study: Study, runs: Sequence[Recording]) -> Picture | Missing:
    """Figures 5 to 7: the learning rate of every layer, from the first steps to the last."""
    own_number = study.benchmark.rates if study.benchmark else None
    title = _title("Learning rates per layer", own_number or 5, "Figures 5 to 7", own_number)
    own = [run for run in runs if run.rates is not None and run.rates.steps]
    chosen = [_chosen(study, pair.form, own) for pair in study.pairs]
    shown_runs = [run for run in chosen if run is not None]
    if not shown_runs:
        return Missing(title, f"no run of a form has a {RATES}.json in the study's folder")
    panels = [
        (run.label, run.rates.steps, run.rates.lr, "learning rate A = lr × S")
        for run in shown_runs
        if run.rates is not None
    ]
    note = (
        f"One run of each, seed {_range(run.seed for run in shown_runs)}. {_TIMES_NOTE} Layers "
        "from the input to the output."
    )
    return _over_layers("layer_learning_rates", title, note, panels, 3)


def _chosen(study: Study, optimizer: str, runs: Sequence[Recording]) -> Recording | None:
    """Of an optimizer's runs that with the learning rate nearest to its best, the first seed."""
    own = [run for run in runs if run.optimizer == optimizer and run.schedule == CONSTANT]
    arms = [a for a in study.arms(CONSTANT) if a.optimizer == optimizer and not a.variant]
    best = next((b[0] for arm in arms if (b := near_best(arm, study.metric))), 1.0)
    return min(
        own,
        key=lambda run: (abs(math.log(run.learning_rate / best)), run.seed),
        default=None,
    )


def norms(study: Study, runs: Sequence[Recording], batch_norm: bool) -> Picture | Missing:
    """Figures 1 and 10: the norm of each layer's gradient and update, over the steps."""
    what = "of the BatchNorm layers" if batch_norm else "per layer"
    title = _title(f"Norms of gradients and updates {what}", 10 if batch_norm else 1)
    chosen = [_chosen(study, name, [r for r in runs if r.norms]) for name in ("sgd", "adam")]
    found = [run for run in chosen if run is not None]
    found = found or [run for run in runs if run.norms][:2]
    if not found:
        return Missing(title, f"no run has a {RECORDS} in the study's folder")
    panels = []
    for run in found:
        for kind in NORMS[1:]:
            table = run.norms.get(kind, {})
            own = {k: v for k, v in table.items() if _is_batch_norm(k) == batch_norm}
            if not batch_norm:  # as the paper does: convolutions and dense layers alone
                own = {k: v for k, v in own.items() if not k.endswith(".bias")}
            if own:
                name = kind.partition("_")[0]
                panels.append((f"{run.label}: {name}", run.steps, own, f"norm of the {name}"))
    if not panels:
        return Missing(title, "the runs that recorded norms have no such layers")
    note = (
        f"Euclidean norms; the paper draws means of absolute values. One run of each, seed "
        f"{_range(run.seed for run in found)}. {_TIMES_NOTE}"
    )
    return _over_layers("norms_batch_norm" if batch_norm else "norms", title, note, panels, 2)


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
    return f"{what} ({name} of the paper)"


def _range(seeds: Iterable[int]) -> str:
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
