"""Peak memory of a training step, with and without gradient release.

    python scripts/release_memory.py --layers 48 --width 1024

An MLP of square layers without biases, float32, on the CPU. What is kept between two steps is the
parameters and the optimizer's state; what a step adds at its worst moment, gradients above all, is
the largest running sum of what torch's allocator gives and takes, as the profiler sees it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from benchmark_step import peak_extra, state_bytes
from measuring import at_least, markdown
from torch import nn
from torch.optim import Optimizer

from hf_adalip import AdamLip, release_gradients

ROWS = ("torch Adam", "AdamLip", "AdamLip, released")


def measure(row: str, layers: int, width: int) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    inputs = torch.randn(4, width)
    optimizer: Optimizer
    if row == "torch Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, foreach=False)
    else:
        optimizer = AdamLip(model.parameters(), lr=1e-5, foreach=False, fused=False)
        if row == "AdamLip, released":
            release_gradients(optimizer)

    def step() -> Any:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    optimizer.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    kept = 4 * count + state_bytes(optimizer)
    added = peak_extra(step, torch.device("cpu"))
    sizes = [f"{size / 2**20:.0f}" for size in (kept, added)]
    return [row, *sizes, f"{(kept + added) / count:.1f}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=at_least(1), default=48)
    parser.add_argument("--width", type=at_least(1), default=1024)
    args = parser.parse_args(argv)
    rows = [measure(row, args.layers, args.width) for row in ROWS]
    count = args.layers * args.width**2
    print(f"{count / 1e6:.1f} M parameters, torch {torch.__version__}\n")
    print(markdown(["", "kept, MiB", "a step adds, MiB", "peak, B/param"], rows))


if __name__ == "__main__":
    main()
