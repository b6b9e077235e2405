"""Per-layer learning rates over a run: found, summarised, recorded and drawn (§6.1, Figs. 5-7)."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import whole
from .optim import LayerRate, LayerwiseOptimizer


def layerwise(optimizer: Any) -> LayerwiseOptimizer | None:
    """The optimizer with an S per layer inside what accelerate or a wrapper made of it, or None."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        if isinstance(optimizer, LayerwiseOptimizer):
            return optimizer
        seen.add(id(optimizer))
        # accelerate's AcceleratedOptimizer; DeepSpeed's, which are none of torch; timm's Lookahead
        attributes = getattr(optimizer, "__dict__", {})
        optimizer = attributes.get("optimizer", attributes.get("_base_optimizer"))
    return None


def summary(rates: Mapping[str, LayerRate]) -> dict[str, float]:
    """min, median and max over the layers of S and A, and how many steps were left out.

    Returns:
        keys `lipschitz_scale/{min,median,max}`, `layer_lr/{min,median,max}` and, if there were
        any, `nonfinite_steps` (the most in any layer). Empty before the first step.
    """
    if not rates:
        return {}
    values = {
        "lipschitz_scale": [rate.scale for rate in rates.values()],
        "layer_lr": [rate.lr for rate in rates.values()],
    }
    found = {
        f"{name}/{what.__name__}": float(what(numbers))
        for name, numbers in values.items()
        for what in (min, statistics.median, max)
    }
    if skipped := max(rate.nonfinite_steps for rate in rates.values()):
        found["nonfinite_steps"] = float(skipped)
    return found


class LayerRateHistory:
    """S and A of every layer at the steps at which `record` was called.

    `steps` is a list of step numbers; `scale` and `lr` have a list of the same length for each
    layer, with None where the layer had no learning rate yet.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scale: dict[str, list[float | None]] = {}
        self.lr: dict[str, list[float | None]] = {}

    def record(self, step: int, rates: Mapping[str, LayerRate]) -> None:
        """Adds the rates at a step; `rates` is from `layer_learning_rates()`."""
        for name in rates:
            self.scale.setdefault(name, [None] * len(self.steps))
            self.lr.setdefault(name, [None] * len(self.steps))
        self.steps.append(step)
        for name in self.scale:
            rate = rates.get(name)
            self.scale[name].append(None if rate is None else rate.scale)
            self.lr[name].append(None if rate is None else rate.lr)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON with the keys steps, scale and lr; the file is whole or not there.

        Raises:
            OSError: if it cannot be written, naming it.
        """
        text = json.dumps({"steps": self.steps, "scale": self.scale, "lr": self.lr})
        whole(Path(path), lambda partial: partial.write_text(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerRateHistory:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not such a history, naming it.
        """
        history = cls()
        try:
            data = json.loads(Path(path).read_text())
            history.steps, history.scale, history.lr = data["steps"], data["scale"], data["lr"]
            tables = [history.scale, history.lr]
            columns = [column for table in tables for column in table.values()]
            if not all(len(column) == len(history.steps) for column in columns):
                raise ValueError
            numbers = itertools.chain(history.steps, *columns)
            if not all(x is None or isinstance(x, (int, float)) for x in numbers):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a history of learning rates") from error
        return history

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draws A of every layer over the steps: values faint, their running median strong.

        With a learning rate that changes, S is drawn beside it; otherwise A has the same shape.

        Raises:
            ImportError: without matplotlib, naming the extra that has it.
        """
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "drawing needs matplotlib: pip install 'hf-adalip[recipes]'"
            ) from error

        tables = [(self.lr, "learning rate of the layer, A = lr × S")]
        if self._lr_changes():
            tables.append((self.scale, "S"))
        figure = Figure(figsize=(7.5 * len(tables), 4.5), layout="constrained")
        colours = matplotlib.colormaps["viridis"]
        panels = figure.subplots(1, len(tables), squeeze=False)[0]
        for axes, (table, label) in zip(panels, tables, strict=True):
            for i, (name, values) in enumerate(table.items()):
                numbers = [math.nan if value is None else value for value in values]
                colour = colours(0.9 * i / max(len(table) - 1, 1))
                axes.plot(self.steps, numbers, color=colour, linewidth=0.8, alpha=0.25)
                axes.plot(self.steps, _running_median(numbers), color=colour, label=name)
            axes.set(xlabel="optimizer step", ylabel=label, yscale="log")
            axes.grid(alpha=0.3, which="both")
        if 0 < len(self.lr) <= 20:
            panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        if title:
            figure.suptitle(title)
        figure.savefig(path, dpi=120)

    def _lr_changes(self) -> bool:
        """Whether A / S is not the same throughout, but for a first step, which is taken at α."""
        ratios = [
            lr / scale
            for name in self.lr
            for lr, scale in zip(self.lr[name][1:], self.scale[name][1:], strict=True)
            if lr is not None and scale
        ]
        return bool(ratios) and max(ratios) > 1.001 * min(ratios)


def _running_median(values: list[float], parts: int = 25) -> list[float]:
    """The median of each value and its neighbours, over a window of 1/parts of them all."""
    half = max(1, len(values) // (2 * parts))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    known = ([v for v in window if math.isfinite(v)] for window in windows)
    return [statistics.median(window) if window else math.nan for window in known]
