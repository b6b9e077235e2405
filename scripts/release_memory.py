"""Peak memory and time of a training step, with and without gradient release.

    python scripts/release_memory.py --layers 48 --width 1024

An MLP of square layers without biases, float32, on the CPU. What is kept between two steps is the
parameters and the optimizer's state; what a step adds at its worst moment, gradients above all, is
the largest running sum of what torch's allocator gives and takes, as the profiler sees it. Times
are medians of a whole step, forward and backward included, of rows that take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmark_step import peak_extra, state_bytes
from measuring import at_least, markdown, seconds, take_turns
from torch import nn
from torch.optim import Optimizer

from hf_adalip import AdamLip, release_gradients

ROWS = ("torch Adam", "AdamLip", "AdamLip, released", "AdamLip, released, bucket_cap_mb=0")
CPU = torch.device("cpu")


class Training(NamedTuple):
    """Of a row; the optimizer's state is there."""

    optimizer: Optimizer
    step: Callable[[], Any]
    count: int  # of parameters


def training(row: str, layers: int, width: int) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    inputs = torch.randn(4, width)
    optimizer: Optimizer
    if row == "torch Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    else:
        optimizer = AdamLip(model.parameters(), lr=1e-5)
        if "released" in row:
            release_gradients(optimizer, bucket_cap_mb=0 if row.endswith("=0") else 25)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    return Training(optimizer, step, sum(p.numel() for p in model.parameters()))


def peak(of: Training) -> list[float]:
    """Bytes that are kept, that a step adds, and of both together for each parameter."""
    of.optimizer.zero_grad()
    kept = 4 * of.count + state_bytes(of.optimizer)
    added = peak_extra(of.step, CPU)
    return [kept, added, (kept + added) / of.count]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=at_least(1), default=48)
    parser.add_argument("--width", type=at_least(1), default=1024)
    parser.add_argument("--rounds", type=at_least(2), default=10)
    args = parser.parse_args(argv)
    trainings = {row: training(row, args.layers, args.width) for row in ROWS}

    def timed(step: Callable[[], Any]) -> dict[str, float]:
        return {"s": seconds(step, CPU)}

    runs = {row: partial(timed, of.step) for row, of in trainings.items()}
    times = {row: found["s"] for row, found in take_turns(runs, args.rounds, seed=0).items()}
    rows = []
    for row, of in trainings.items():
        kept, added, per_parameter = peak(of)
        sizes = [f"{kept / 2**20:.0f}", f"{added / 2**20:.0f}", f"{per_parameter:.1f}"]
        rows.append([row, *sizes, f"{1e3 * statistics.median(times[row]):.0f}"])
    count = args.layers * args.width**2
    print(f"{count / 1e6:.1f} M parameters, torch {torch.__version__}\n")
    print(markdown(["", "kept, MiB", "a step adds, MiB", "peak, B/param", "a step, ms"], rows))


if __name__ == "__main__":
    main()
