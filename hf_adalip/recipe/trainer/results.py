"""What a finished run of Trainer came to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer

from ...monitor import LayerRateHistory, secant_summary
from ..run import facts, nonfinite_steps, said_of_nonfinite


def best_step(trainer: Trainer) -> int | None:
    """The step of the checkpoint that --load_best_model_at_end went back to, if it did."""
    state = trainer.state
    found = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return int(state.best_global_step) if found else None


def evaluated(trainer: Trainer, best: int | None) -> bool:
    """Whether the last evaluation was of the model as it is now, or there can be none."""
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    now = trainer.state.global_step
    return trainer.eval_dataset is None or (steps[-1:] == [now] and best in (None, now))


_TIMES = ("_runtime", "_per_second")


def scores(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last evaluation, and the mean training loss of the last epoch from the logs."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    last = evaluations[-1] if evaluations else {}
    found = {k: v for k, v in last.items() if k.startswith("eval_") and not k.endswith(_TIMES)}
    logs = [entry for entry in history if "loss" in entry]
    steps = [0, *(entry["step"] for entry in logs)]
    begin = math.ceil(logs[-1]["epoch"]) - 1 if logs else 0
    weighted = [
        (entry["loss"], step - before)
        for entry, before, step in zip(logs, steps, steps[1:], strict=False)
        if entry["epoch"] > begin
    ]
    if count := sum(weight for _, weight in weighted):
        found["train_loss"] = sum(loss * weight for loss, weight in weighted) / count
    return found


_LIBRARIES = ("transformers", "scipy", "peft")  # besides those of every recipe


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """What the results say of data, model and place."""
    return {
        "train_samples": len(trainer.train_dataset),
        "eval_samples": len(trainer.eval_dataset),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        **facts(trainer.args.device, *_LIBRARIES),
        "nonfinite_steps": nonfinite_steps(trainer.optimizer),
        "secant_rate": secant_summary(trainer.optimizer).get("secant/rate"),
    }


def table(results: Mapping[str, Any], rates: LayerRateHistory) -> str:
    """The run in a few lines."""
    scores = [name for name in results if name.startswith("eval_") or name == "train_loss"]
    scores = [name for name in scores if isinstance(results[name], float)]
    lines = [f"{name:28}{results[name]:10.4f}" for name in scores]
    medians = {
        layer: statistics.median(x for x in values if x is not None)
        for layer, values in rates.scale.items()
    }
    if medians:
        ordered = sorted(medians, key=medians.__getitem__)
        lines += ["", f"median of S over the run, of {len(ordered)} layers:"]
        for what, at in (("lowest", 0), ("middle", len(ordered) // 2), ("highest", -1)):
            lines.append(f"  {what:10}{medians[ordered[at]]:8.3f}  {ordered[at]}")
    lines += said_of_nonfinite(results["nonfinite_steps"], results["step"])
    return "\n".join(lines)
