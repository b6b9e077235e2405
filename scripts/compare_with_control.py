"""Does S help, or does its median? An optimizer with S, its base, and the constant-S control.

    python scripts/compare_with_control.py --optim adamlip --learning_rate 1e-4 1e-3 1e-2 \\
        --seeds 0 1 2 3 4 -- --dataset_name digits --cpu

For every learning rate: the base optimizer (adam), the one with S (adamlip), and the base at
lr × the median of S over the layers and steps of adamlip's runs. What comes behind `--` goes to
recipes/mnist.py. Prints means over the seeds with half-widths of 95 % confidence intervals
(Student's t), and what S makes of each metric: the mean over the seeds of its difference from
the run with the same seed without it. Writes every result to OUTPUT_DIR/comparison.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from mnist import RECIPE

from hf_adalip.errors import DataError, UsageError
from hf_adalip.recipe.image.training import train
from hf_adalip.registry import get_optimizer_info

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
METRICS = ("train_accuracy", "eval_accuracy", "train_loss")


def run(optim: str, lr: float, seed: int, folder: Path, rest: list[str]) -> dict[str, Any]:
    """One training run; its results, with the median of S if it has one."""
    options = {"optim": optim, "learning_rate": lr, "seed": seed, "output_dir": folder}
    argv = [f"--{key}={value}" for key, value in options.items()]
    training = train(RECIPE, [*argv, "--overwrite_output_dir", *rest])
    results = training.results(finished=True)
    scales = [s for layer in training.rates.scale.values() for s in layer if s is not None]
    return results | {"median_scale": statistics.median(scales) if scales else None}


def interval(values: list[float], sign: str = "") -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.4f}"
    half = T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{sign}.4f} ± {half:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optim", default="adamlip", help="one of the six (default: adamlip)")
    parser.add_argument("--learning_rate", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at most 10")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"))
    own = list(sys.argv[1:] if argv is None else argv)
    rest = own[own.index("--") + 1 :] if "--" in own else []
    args = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    if not 1 <= len(args.seeds) <= len(T) + 1:
        parser.error(f"--seeds takes 1 to {len(T) + 1} values, got {len(args.seeds)}")
    try:
        info = get_optimizer_info(args.optim)
        if info.base is None or not info.takes_layers:
            parser.error(f"--optim {args.optim} has no learning rate per layer on top of a base")
        base_name = info.base.__name__.lower()
        get_optimizer_info(base_name)  # a base of timm's has none
    except ValueError as error:
        parser.error(f"--optim: {error}")
    try:
        compare(args, base_name, rest)
    except (UsageError, DataError) as error:
        parser.error(str(error))


def compare(args: argparse.Namespace, base_name: str, rest: list[str]) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for lr in args.learning_rate:
        for name in (args.optim, base_name):
            found[f"{name} at {lr:g}"] = [
                run(name, lr, seed, args.output_dir / f"{name}-{lr:g}-{seed}", rest)
                for seed in args.seeds
            ]
        with_s = found[f"{args.optim} at {lr:g}"]
        scale = statistics.median(r["median_scale"] for r in with_s)
        found[f"{base_name} at {lr:g} × {scale:.2f}"] = [
            run(base_name, lr * scale, seed, args.output_dir / f"control-{lr:g}-{seed}", rest)
            for seed in args.seeds
        ]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "comparison.json").write_text(json.dumps(found, indent=2))
    print("| | " + " | ".join(METRICS) + " | " + " | ".join(f"S: {m}" for m in METRICS) + " |")
    print("|---|" + "---|" * 2 * len(METRICS))
    for name, runs in found.items():
        if name.startswith(f"{args.optim} at"):
            with_s = runs
        cells = [interval([r[metric] for r in runs]) for metric in METRICS]
        pairs = list(zip(with_s, runs, strict=True))
        changes = [interval([r[m] - other[m] for r, other in pairs], "+") for m in METRICS]
        cells += [""] * len(METRICS) if runs is with_s else changes
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
