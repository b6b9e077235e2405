"""Pictures of runs: the layers' learning rates and S over the steps, and the losses."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import RESULTS
from .monitor import RATES, LayerRateHistory

Table = Mapping[str, Sequence[float | None]]

LINES = 8
"""Layers that are drawn as lines; more are the rows of a heat map."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which the colour-blind can tell apart."""

SCALE, RATE = "Lipschitz scale S", "learning rate A = lr × S"
STEP = "optimizer step"


def figure_of(width: float, height: float, title: str) -> Any:
    """An empty figure of matplotlib, of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'hf-adalip[recipes]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def draw_rates(history: LayerRateHistory, title: str = "") -> Any:
    """A figure of S and of A of every layer over the steps."""
    figure = figure_of(13.0, _height(len(history.lr)), title)
    _rates(figure, figure.subplots(1, 2), history)
    return figure


def draw_probes(table: Mapping[str, Sequence[float]], title: str = "") -> Any:
    """A figure of the rates that steps were measured at, and of r, over the steps."""
    figure = figure_of(11.0, 4.2, title)
    rate, r = figure.subplots(1, 2)
    rate.plot(table["step"], table["rate"], color=COLOURS[0], marker=".")
    rate.set(title="rate of the measured steps", xlabel=STEP, ylabel="rate", yscale="log")
    plain_ticks(rate.yaxis)
    r.plot(table["step"], table["r"], color=COLOURS[1], linestyle="", marker=".")
    r.axhline(0.0, color="0.4", linestyle="--", linewidth=1.0)
    # the slopes of noisy batches can have any ratio
    r.set(title="r: slope after the step over slope before", xlabel=STEP, ylim=(-3.0, 2.0))
    for axes in (rate, r):
        axes.grid(alpha=0.3)
    return figure


def _height(layers: int) -> float:
    return 4.5 if layers <= LINES else min(14.0, 2.2 + 0.15 * layers)


def _rates(figure: Any, panels: Any, history: LayerRateHistory) -> None:
    tables: tuple[tuple[str, Table], ...] = ((SCALE, history.scale), (RATE, history.lr))
    for number, (axes, (label, table)) in enumerate(zip(panels, tables, strict=True)):
        if len(table) <= LINES:
            _lines(axes, history.steps, table, label, legend=number == 1)
        else:
            _heat_map(figure, axes, history.steps, table, label, names=number == 0)


def _lines(axes: Any, steps: Sequence[int], table: Table, label: str, legend: bool) -> None:
    """The values of each layer faint, their running median strong."""
    for colour, (name, values) in zip(COLOURS, table.items(), strict=False):
        numbers = [math.nan if value is None else value for value in values]
        axes.plot(steps, numbers, color=colour, linewidth=0.8, alpha=0.25)
        axes.plot(steps, running_median(numbers), color=colour, linewidth=1.8, label=name)
    if label == SCALE:
        axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1.0)
    unit = "S (a factor of the learning rate)" if label == SCALE else "A"
    axes.set(title=label, xlabel=STEP, ylabel=unit, yscale="log")
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    if legend and table:
        axes.legend(title="layer", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _heat_map(
    figure: Any, axes: Any, steps: Sequence[int], table: Table, label: str, names: bool
) -> None:
    """A row for each layer, the first at the top; S in colours that meet at 1."""
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = [[math.nan if x is None or x <= 0 else x for x in values] for values in table.values()]
    known = sorted(x for row in rows for x in row if math.isfinite(x)) or [1.0]
    low, high = known[len(known) // 100], known[-1 - len(known) // 100]
    if label == SCALE:
        high = max(1.5, high, 1.0 / low)  # as far below 1 as above it
        low = 1.0 / high
    elif high <= 1.01 * low:
        low, high = low / 1.5, high * 1.5
    colours = matplotlib.colormaps["RdBu_r" if label == SCALE else "viridis"].with_extremes(
        bad="0.8"
    )
    edges = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [steps[0] - 0.5, *edges, steps[-1] + 0.5]
    mesh = axes.pcolormesh(
        edges,
        range(len(rows) + 1),
        rows,
        norm=LogNorm(low, high),
        cmap=colours,
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.set(title=label, xlabel=STEP)
    every = math.ceil(len(rows) / 80)
    places = range(0, len(rows), every)
    axes.set_yticks([place + 0.5 for place in places])
    if names:
        shown = [_short(name) for name in list(table)[::every]]
        axes.set_yticklabels(shown, fontsize=7)
        axes.set_ylabel("layer, from the input down")
    else:
        axes.set_yticklabels([])
    bar = figure.colorbar(mesh, ax=axes, extend="both", pad=0.02, aspect=40)
    plain_ticks(bar.ax.yaxis)
    if label == SCALE:
        bar.ax.axhline(1.0, color="black", linewidth=1.5)


def plain_ticks(axis: Any) -> None:
    """0.5, 1, 2 rather than 5×10⁻¹ on a logarithmic axis, a few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else 1.0
    subs = [1.0, 1.5, 2.0, 3.0, 5.0, 7.0] if decades < 1.2 else [1.0, 2.0, 5.0]
    subs = [1.0] if decades > 3 else subs
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(name: str, most: int = 42) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def running_median(values: Sequence[float], parts: int = 25) -> list[float]:
    """The median of each value and its neighbours, over a window of 1/parts of them all."""
    half = max(1, len(values) // (2 * parts))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    known = ([v for v in window if math.isfinite(v)] for window in windows)
    return [statistics.median(window) if window else math.nan for window in known]


@dataclass
class RunCurves:
    """What a run's folder has to be drawn."""

    name: str
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # step and loss
    rates: LayerRateHistory | None = None


def read_run(folder: Path) -> RunCurves:
    """The losses and learning rates in the output folder of a recipe or of a Trainer.

    Raises:
        ValueError: if it has none, or what it has cannot be read, naming it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    run = RunCurves(folder.resolve().name)
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step)
    states += [path for path in (folder / "trainer_state.json",) if path.is_file()]
    for path, key in ((folder / RESULTS, "epochs"), *((state, "log_history") for state in states)):
        if path.is_file():
            _add_losses(run, path, key)
    if (path := folder / f"{RATES}.json").is_file():
        run.rates = LayerRateHistory.load(path)
    if not run.losses and not run.rates:
        raise ValueError(
            f"{folder} has no run: neither {RESULTS}, trainer_state.json nor {RATES}.json with "
            "something to draw"
        )
    return run


def _step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _add_losses(run: RunCurves, path: Path, key: str) -> None:
    try:
        entries = json.loads(path.read_text()).get(key) or []
        for entry in entries:
            for name, label in (("train_loss", "train"), ("loss", "train"), ("eval_loss", "eval")):
                if isinstance(entry.get(name), (int, float)) and "train_runtime" not in entry:
                    points = dict(run.losses.get(label, ()))
                    points[entry["step"]] = entry[name]
                    run.losses[label] = sorted(points.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as the record of a run") from error


def draw_runs(runs: Sequence[RunCurves]) -> Any:
    """Losses, and S and A: of one run those of every layer, of several the median and the range."""
    rates = [run for run in runs if run.rates is not None and run.rates.steps]
    if len(runs) == 1 and rates:
        history = rates[0].rates
        assert history is not None
        below = _height(len(history.lr))
        figure = figure_of(13.0, 3.6 + below, runs[0].name)
        above, under = figure.subfigures(2, 1, height_ratios=[3.6, below])
        _losses(above.subplots(), runs)
        _rates(under, under.subplots(1, 2), history)
        return figure
    panels = 3 if rates else 1
    figure = figure_of(6.0 * panels, 4.8, "")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _losses(axes[0], runs)
    for place, label in zip(axes[1:], (SCALE, RATE), strict=False):
        for number, run in enumerate(runs):
            if run in rates and run.rates is not None:
                table = run.rates.scale if label == SCALE else run.rates.lr
                _range(place, run, table, COLOURS[number % len(COLOURS)])
        if label == SCALE:
            place.axhline(1.0, color="0.4", linestyle="--", linewidth=1.0)
        place.set(title=f"{label}: median and range of layers", xlabel=STEP, yscale="log")
        plain_ticks(place.yaxis)
        place.grid(alpha=0.3)
    return figure


def _losses(axes: Any, runs: Sequence[RunCurves]) -> None:
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        for kind, points in run.losses.items():
            steps, losses = zip(*points, strict=True)
            style = {"linestyle": "--" if kind == "train" else "-", "marker": "."}
            label = f"{kind}" if len(runs) == 1 else f"{run.name}, {kind}"
            axes.plot(steps, losses, color=colour, label=label, **style)
    axes.set(title="loss", xlabel=STEP, ylabel="loss")
    axes.grid(alpha=0.3)
    if any(run.losses for run in runs):
        axes.legend(fontsize="small")


def _range(axes: Any, run: RunCurves, table: Table, colour: str) -> None:
    assert run.rates is not None
    columns = [
        [x for x in column if x is not None and x > 0]
        for column in zip(*table.values(), strict=True)
    ]
    steps = [s for s, column in zip(run.rates.steps, columns, strict=True) if column]
    columns = [column for column in columns if column]
    axes.plot(
        steps, running_median([statistics.median(c) for c in columns]), color=colour, label=run.name
    )
    low, high = ([f(c) for c in columns] for f in (min, max))
    axes.fill_between(
        steps, running_median(low), running_median(high), color=colour, alpha=0.15, linewidth=0
    )


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, whatever the name of the file."""
    figure.savefig(path, dpi=110, format="png")
