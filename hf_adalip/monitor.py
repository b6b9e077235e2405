"""Per-layer learning rates over a run: found, summarised, recorded and drawn (§6.1, Figs. 5-7)."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .files import whole
from .optim import LayerRate, LayerwiseOptimizer, Secant

T = TypeVar("T")


def layerwise(optimizer: Any) -> LayerwiseOptimizer | None:
    """The optimizer with an S per layer inside what accelerate or a wrapper made of it, or None."""
    return _inside(optimizer, LayerwiseOptimizer)


def secant(optimizer: Any) -> Secant | None:
    """The `Secant` inside what accelerate or a wrapper made of it, or None."""
    return _inside(optimizer, Secant)


def _inside(optimizer: Any, kind: type[T]) -> T | None:
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        if isinstance(optimizer, kind):
            return optimizer
        seen.add(id(optimizer))
        # accelerate's AcceleratedOptimizer; DeepSpeed's, which are none of torch; timm's Lookahead
        attributes = getattr(optimizer, "__dict__", {})
        optimizer = attributes.get("optimizer", attributes.get("_base_optimizer"))
    return None


def secant_summary(optimizer: Any) -> dict[str, float]:
    """The rate that a `Secant` has found, and its last measurement.

    Args:
        optimizer: a `Secant`, or what accelerate or a wrapper made of it.

    Returns:
        keys `secant/rate`, and after the first measurement `secant/r` and `secant/probes`, how
        many are recorded. Empty before the first step, and for other optimizers.
    """
    found = secant(optimizer)
    if found is None or not found.rate:
        return {}
    values = {"secant/rate": found.rate}
    if found.probes:
        values |= {"secant/r": found.probes[-1].r, "secant/probes": float(len(found.probes))}
    return values


def summary(rates: Mapping[str, LayerRate]) -> dict[str, float]:
    """min, median and max over the layers of S and A, and how many steps were left out.

    Returns:
        keys `lipschitz_scale/{min,median,max}`, `layer_lr/{min,median,max}` and, if there were
        any, `nonfinite_steps` (the most in any layer). Empty before the first step.

    Examples:
        >>> rate = LayerRate(scale=0.5, lr=0.05, norm=1.0, nonfinite_steps=0)
        >>> summary({"head": rate, "body": rate._replace(scale=1.5)})["lipschitz_scale/median"]
        1.0
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


RATES = "layer_learning_rates"
"""The name, without its ending, of the files with them in a run's folder."""

PROBES = "secant"
"""The name, without its ending, of the files with the measurements of a `Secant`."""

RECORDS = 500
"""How often in a run the loss and the layers' learning rates are copied from the device."""


Table = dict[str, list[float | None]]
"""A value of every layer, by its name, at each of some steps."""


def _load(
    path: str | os.PathLike[str], keys: Sequence[str], what: str
) -> tuple[list[int], dict[str, Table]]:
    """The steps of a file, and the tables under those keys."""
    try:
        data = json.loads(Path(path).read_text())
        steps, tables = data["steps"], {key: data[key] for key in keys}
        columns = [column for table in tables.values() for column in table.values()]
        if not all(len(column) == len(steps) for column in columns):
            raise ValueError
        if not all(x is None or isinstance(x, (int, float)) for x in chain(steps, *columns)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)} is not {what}") from error
    return steps, tables


class LayerRateHistory:
    """S and A of every layer at the steps at which `record` was called.

    `steps` is a list of step numbers; `scale` and `lr` have a list of the same length for each
    layer, with None where the layer had no learning rate yet.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scale: Table = {}
        self.lr: Table = {}

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
        history.steps, tables = _load(path, ("scale", "lr"), "a history of learning rates")
        history.scale, history.lr = tables.values()
        return history

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draws S and A of every layer over the steps, as a PNG.

        Up to eight layers are lines, each value faint and their running median strong; more are
        rows of a heat map, the first layer at the top, with the colours of S meeting at 1.

        Raises:
            ImportError: without matplotlib, naming the extra that has it.
        """
        from .plots import draw_rates, save_figure

        save_figure(draw_rates(self, title), path)


def save_probes(optimizer: Secant, folder: Path, title: str) -> None:
    """Writes the measurements to `secant.json` (lists of step, rate and r) and draws them in
    `secant.png`; nothing if there were none.

    Raises:
        ImportError: without matplotlib, naming the extra that has it.
        OSError: if a file cannot be written, naming it.
    """
    from .plots import draw_probes, save_figure

    if not optimizer.probes:
        return
    probes = [probe for probe in optimizer.probes if math.isfinite(probe.r)]
    table = {key: [getattr(probe, key) for probe in probes] for key in ("step", "rate", "r")}
    whole(folder / f"{PROBES}.json", lambda path: path.write_text(json.dumps(table)))
    save_figure(draw_probes(table, title), folder / f"{PROBES}.png")


NORMS = "records.json"
"""The file with the layers' norms and mean absolute values in a run's folder."""

_NORM_RECORDS = 60
_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": torch.linalg.vector_norm,
    "mean_abs": lambda x: x.abs().mean(),
}
_NORM_TABLES = tuple(
    f"{what}_{measure}" for what in ("weight", "gradient", "update") for measure in _MEASURES
)


class NormHistory:
    """How large every layer's weights, gradient and update are (Figs. 1 and 10).

    The Euclidean norm, which S is made of, and the mean of the absolute values, which the paper
    draws (§3.4), at up to 60 steps, evenly spread over a run. A layer is a parameter here: the γ
    and the β of batch normalisation are two. The weights are those that the gradient was taken at.

    Args:
        model: whose parameters are whole on this process.
        optimizer: that steps them.
        total_steps: of the run.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> norms = NormHistory(model, optimizer, total_steps=1)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> [norms.tables[key]["weight"] for key in ("gradient_norm", "update_mean_abs")]
        [[5.0], [1.75]]
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        self._params = dict(model.named_parameters())
        self.steps: list[int] = []
        self.tables: dict[str, Table] = {
            key: {name: [] for name in self._params} for key in _NORM_TABLES
        }
        self._every = math.ceil(total_steps / _NORM_RECORDS)
        self._step = 0
        self._before: list[Tensor] | None = None
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self._step % self._every == 0:
            self._before = [param.detach().clone() for param in self._params.values()]
            self._add("weight", self._before)
            self._add("gradient", (param.grad for param in self._params.values()))
        self._step += 1

    def _end(self, *_: Any) -> None:
        if self._before is not None:
            after = (param.detach() for param in self._params.values())
            self._add("update", (new - old for new, old in zip(after, self._before, strict=True)))
            self.steps.append(self._step)
            self._before = None

    def _add(self, what: str, found: Iterable[Tensor | None]) -> None:
        for name, x in zip(self._params, found, strict=True):
            x = None if x is None else x.float()
            for measure, of in _MEASURES.items():
                value = math.nan if x is None else of(x).item()
                finite = value if math.isfinite(value) else None  # as JSON has it
                self.tables[f"{what}_{measure}"][name].append(finite)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON with the steps and all tables, whole or not at all.

        Raises:
            OSError: if it cannot be written, naming it.
        """
        text = json.dumps({"steps": self.steps, **self.tables})
        whole(Path(path), lambda partial: partial.write_text(text))


def load_norms(path: str | os.PathLike[str]) -> tuple[list[int], dict[str, Table]]:
    """The steps and the tables that `NormHistory.save` wrote.

    Raises:
        ValueError: if the file is not such a record, naming it.
    """
    return _load(path, _NORM_TABLES, "a record of norms")
