"""What a run of a recipe of images came to."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...diagnose.checks import Finding, diverged
from ...monitor import LayerRateHistory
from ..run import said_of_nonfinite

METRICS = ("train_accuracy", "train_loss", "eval_accuracy", "eval_loss")


def scores(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of the last epoch, and the best values of each."""
    last: Mapping[str, Any] = epochs[-1] if epochs else {}
    best = {
        f"best_{name}": (max if name.endswith("accuracy") else min)(values)
        for name in METRICS
        if (values := [e[name] for e in epochs if math.isfinite(e[name])])
    }
    return {**{name: last.get(name) for name in METRICS}, **best}


def is_finite(last: Mapping[str, Any]) -> bool:
    """Whether the losses of the last epoch are."""
    return math.isfinite(last["train_loss"]) and math.isfinite(last["eval_loss"])


def said_of_end(last: Mapping[str, Any], num_classes: int) -> Finding | None:
    """What is to be said of a finished run whose losses are not finite, or whose last epoch,
    trained on and evaluated after it, came to no more than guessing."""
    losses = last["train_loss"], last["eval_loss"]
    classes = num_classes if last["epoch"] >= 1 else 1
    chance = math.log(classes) if classes > 1 else None
    worst = next((loss for loss in losses if not math.isfinite(loss)), min(losses))
    return diverged(worst, "loss of the last epoch", chance)


def table(epochs: Sequence[Mapping[str, Any]], rates: LayerRateHistory, skipped: int) -> str:
    """The run in a few lines.

    Args:
        epochs: what each came to.
        rates: of the layers; none, if the optimizer has no S.
        skipped: steps that some layer was left out of.
    """
    lines = [f"{'':16}{'final':>10}{'best':>10}  in epoch"]
    for name in METRICS:
        better = max if name.endswith("accuracy") else min
        entry = better(epochs, key=operator.itemgetter(name))
        numbers = "".join(_shown(e[name]) for e in (epochs[-1], entry))
        lines.append(f"{name:16}{numbers}  {entry['epoch']:g}")
    wide = max(16, *(len(layer) + 1 for layer in rates.scale), 0)
    if rates.steps:
        lines += ["", f"{'layer':{wide}}{'median S':>10}{'last S':>10}{'last A':>12}"]
    for layer, scales in rates.scale.items():
        known = [scale for scale in scales if scale is not None]
        last = f"{known[-1]:10.3f}{rates.lr[layer][-1] or math.nan:12.2e}"
        lines.append(f"{layer:{wide}}{statistics.median(known):10.3f}{last}")
    return "\n".join([*lines, *said_of_nonfinite(skipped, epochs[-1]["step"])])


def _shown(number: float) -> str:
    return f"{number:10.4f}" if abs(number) < 1e4 else f"{number:10.2e}"
