"""What Secant costs: a training step with it against one of its base optimizer alone.

    OMP_NUM_THREADS=1 python scripts/secant_cost.py --rounds 5

The base and Secant take turns, step by step, on a small character model, late enough that a step in
`every` is measured. Printed are the medians of CPU seconds over the base's: of Secant's ordinary
steps, of those that keep a copy of the parameters and of those that measure, and the mean step that
they come to; and the most memory that is held between steps, in copies of the parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from hf_adalip import Secant


class Model(nn.Module):
    """Two transformer blocks over characters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x)))


class Training:
    """A model under an optimizer, and the seconds and kinds of its steps."""

    def __init__(self, args: argparse.Namespace, with_secant: bool) -> None:
        torch.manual_seed(0)
        self.model, self.args = Model(args.width), args
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.secant = Secant(base, args.every, model=self.model) if with_secant else None
        self.optimizer = base if self.secant is None else self.secant
        self.seconds: dict[str, list[float]] = {"ordinary": [], "keeping": [], "measuring": []}

    def step(self, counted: bool) -> None:
        x, y = torch.randint(0, 64, (2, self.args.batch, 64))

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            loss.backward()
            return loss.detach()

        kind = "ordinary"
        if self.secant is not None and self.secant.due:
            kind = "measuring"
        started = time.process_time()
        self.optimizer.step(closure)
        seconds = time.process_time() - started
        if kind == "ordinary" and self.secant is not None and self.secant.due:
            kind = "keeping"  # the step that is to be measured, of which a copy is made
        if counted:
            self.seconds[kind].append(seconds)

    def copies(self) -> float:
        """Of the parameters, now."""
        if self.secant is None:
            return 0.0
        held = sum(x.numel() for x in self.secant._previous.values())
        return held / sum(p.numel() for p in self.model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, secant = Training(args, False), Training(args, True)
    warm_up = 5 * args.every  # gaps are a quarter of the steps taken, and `every` from then on
    for _ in range(warm_up):
        secant.step(counted=False)
    base.step(counted=False)
    held = []
    for _ in range(args.rounds * args.every):
        base.step(counted=True)
        secant.step(counted=True)
        held.append(secant.copies())
    usual = statistics.median(base.seconds["ordinary"])
    ratios = {kind: statistics.median(x) / usual for kind, x in secant.seconds.items()}
    counts = {kind: len(x) for kind, x in secant.seconds.items()}
    mean = sum(ratios[kind] * n for kind, n in counts.items()) / sum(counts.values())
    parameters = sum(p.numel() for p in base.model.parameters())
    print(f"AdamW, {parameters} parameters, every={args.every}, {sum(counts.values())} steps each:")
    for kind, ratio in ratios.items():
        low, *_, high = statistics.quantiles([x / usual for x in secant.seconds[kind]], n=4)
        print(f"{kind:10} {ratio:.3f}  (quartiles {low:.3f} and {high:.3f}, {counts[kind]} steps)")
    print(f"{'mean':10} {mean:.3f}")
    print(f"copies of the parameters held: {max(held):g} at most, in {sum(map(bool, held))} steps")


if __name__ == "__main__":
    main()
