"""Trials of `Secant` on small tasks, beside tuned AdamW or SGD, Prodigy and schedule-free AdamW.

    python scripts/secant_trials.py trials.jsonl --text input.txt --mnist ylecun/mnist
        --cifar uoft-cs/cifar10 --reviews cornell-movie-review-data/rotten_tomatoes
        --encoder sentence-transformers/all-MiniLM-L6-v2
    python scripts/secant_trials.py trials.jsonl --report

Every line of the file is one run; what is in it already is not run again. A task runs on one
thread in seconds, and only those whose data is given. The gain of a run is how far its validation
loss is below chance, the logarithm of the number of classes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_adalip.experiments.statistics import interval
from hf_adalip.optim.secant import Law, Secant
from hf_adalip.optim.secant.law import next_probe
from hf_adalip.optim.secant.probe import Probe, slopes
from hf_adalip.optim.secant.ranks import slope

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SCHEDULES = ("constant", "linear", "decay")
Batch = tuple[Tensor, Tensor]


# The tasks


@dataclass(frozen=True)
class Data:
    """Training and validation examples, in memory."""

    inputs: Tensor
    labels: Tensor
    val_inputs: Tensor
    val_labels: Tensor

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Without end, shuffled anew in every epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for index in order[: len(order) // size * size].view(-1, size):
                yield self.inputs[index], self.labels[index]


@dataclass(frozen=True)
class Task:
    """What is trained: `data` names the argument that its data comes from."""

    data: str
    load: Callable[[argparse.Namespace], Data]
    model: Callable[[argparse.Namespace], nn.Module]
    batch: int
    steps: int
    classes: int


@cache
def _text(path: str, length: int) -> Data:
    text = Path(path).read_text(encoding="utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([letters[letter] for letter in text])
    cut = int(0.9 * len(codes))
    parts = []
    for part in (codes[:cut], codes[cut:]):
        rows = part[: (len(part) - 1) // length * length].view(-1, length)
        ahead = part[1 : rows.numel() + 1].view(-1, length)
        parts += [rows, ahead]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(parts[2]), generator=generator)[:128]
    return Data(parts[0], parts[1], parts[2][chosen], parts[3][chosen])


@cache
def _images(path: str, image: str, train: int, val: int) -> Data:
    import datasets
    import numpy as np

    splits = datasets.load_dataset(path)
    parts: list[Tensor] = []
    for split, count in (("train", train), ("test", val)):
        rows = splits[split].shuffle(seed=0).select(range(count))
        pixels = torch.from_numpy(np.stack([np.asarray(x) for x in rows[image]])).float() / 255
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        parts += [((pixels - 0.5) / 0.25).contiguous(), torch.tensor(rows["label"])]
    return Data(*parts)


@cache
def _digits() -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:1347], order[1347:]
    return Data(inputs[train], labels[train], inputs[val], labels[val])


@cache
def _reviews(path: str, encoder: str, length: int) -> tuple[Data, Tensor]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    splits = datasets.load_dataset(path)
    parts: list[Tensor] = []
    for split, count in (("train", 4000), ("validation", 300)):
        rows = splits[split].shuffle(seed=0).select(range(count))
        codes = tokenizer(
            list(rows["text"]),
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        parts += [codes["input_ids"], torch.tensor(rows["label"])]
    # Only the tokens that occur: the others have no gradient.
    used = torch.cat([parts[0], parts[2]]).unique()
    assert used[0] == 0, "the padding"
    for i in (0, 2):
        parts[i] = torch.searchsorted(used, parts[i])
    return Data(*parts), used


class GPT(nn.Module):
    def __init__(self, letters: int = 65, length: int = 64, width: int = 64, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                4,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes) + self.place
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


class LSTM(nn.Module):
    def __init__(self, letters: int = 65, width: int = 96):
        super().__init__()
        self.embed = nn.Embedding(letters, 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(codes))[0])


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.skip(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class GRU(nn.Module):
    """Reads an image of a digit row by row."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.gru = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.view(-1, 8, 8))[0][:, -1])


def dropout_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    """The first two layers of a pretrained encoder, its mean token and a new head."""

    def __init__(self, path: str, tokens: Tensor):
        super().__init__()
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(path, num_hidden_layers=2, add_pooling_layer=False)
        words = self.body.get_input_embeddings().weight.detach()[tokens]
        self.body.set_input_embeddings(nn.Embedding.from_pretrained(words, False, padding_idx=0))
        self.head = nn.Linear(self.body.config.hidden_size, 2)

    def forward(self, codes: Tensor) -> Tensor:
        seen = codes != 0
        out = self.body(codes, attention_mask=seen.long()).last_hidden_state
        mean = (out * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return self.head(mean)


TASKS = {
    "gpt": Task("text", lambda a: _text(a.text, 64), lambda a: GPT(), 8, 300, 65),
    "encoder": Task(
        "encoder",
        lambda a: _reviews(a.reviews, a.encoder, 24)[0],
        lambda a: Encoder(a.encoder, _reviews(a.reviews, a.encoder, 24)[1]),
        8,
        80,
        2,
    ),
    "mlp": Task("", lambda a: _digits(), lambda a: mlp(), 32, 400, 10),
    "convnet": Task(
        "mnist", lambda a: _images(a.mnist, "image", 10000, 2000), lambda a: convnet(), 32, 300, 10
    ),
    "resnet": Task(
        "cifar", lambda a: _images(a.cifar, "img", 10000, 2000), lambda a: resnet(), 32, 300, 10
    ),
    "lstm": Task("text", lambda a: _text(a.text, 64), lambda a: LSTM(), 8, 250, 65),
    "gru": Task("", lambda a: _digits(), lambda a: GRU(), 32, 300, 10),
    "dropout": Task(
        "mnist",
        lambda a: _images(a.mnist, "image", 10000, 2000),
        lambda a: dropout_mlp(),
        32,
        300,
        10,
    ),
}
TASKS["lstm-long"] = replace(TASKS["lstm"], steps=2000)


# What was tried besides


class ForwardSecant(Secant):
    """Takes the loss alone at the parameters before a step. Were the loss quadratic along it, that,
    the loss after it and the slope there would give e0.

    The point would be to save a backward pass; in a trial it is made, and not looked at.
    """

    def _probe(self, closure: Callable[[], Any]) -> Any:
        params, olds = zip(*self._previous.items(), strict=True)
        news = [p.clone() for p in params]
        steps = [q - p for p, q in zip(news, olds, strict=True)]
        torch._foreach_copy_(params, olds)
        with self._unseen(), torch.enable_grad():
            before = float(closure())
        torch._foreach_copy_(params, news)
        with torch.enable_grad():
            loss = closure()
        d1, square, size = slope(params, steps).tolist()
        self._previous = {}
        if (rate := self.rate * self._schedule) > 0.0:
            d0 = 2.0 * (before - float(loss)) - d1
            scale = max(math.sqrt(square * size), abs(d0))
            self._follow(Probe(self._step, rate, d0 / rate, d1 / rate, scale / rate))
        self._measured = next_probe(self._step, self.every)
        return loss


class LayerSecant(Secant):
    """A factor for each tensor (here a group) on top of the rate: ln f_l += κ/10·(r_l - r), r of
    averaged slopes, less the mean over the tensors; from 1/3 to 3."""

    def __init__(self, optimizer: Optimizer, every: int = 20, **options: Any) -> None:
        super().__init__(optimizer, every, **options)
        self.logs = torch.zeros(len(self.param_groups))
        self.sums = torch.zeros(2, len(self.param_groups))

    def _base_step(self, rate: float, scheduled: bool = True) -> None:
        given = [group["lr"] for group in self.param_groups]
        for group, log in zip(self.param_groups, self.logs.tolist(), strict=True):
            group["lr"] *= math.exp(log)
        super()._base_step(rate, scheduled)
        for group, lr in zip(self.param_groups, given, strict=True):
            group["lr"] = lr
        if scheduled and self._previous:  # of the first group, without its factor
            self._schedule = given[0] / self.param_groups[0]["reference_lr"]

    def _probe(self, closure: Callable[[], Any]) -> Any:
        params, olds = zip(*self._previous.items(), strict=True)
        steps = [q - p for p, q in zip(params, olds, strict=True)]
        rows: list[Tensor] = []

        def seen() -> Any:
            loss = closure()
            rows.append(slopes([p.grad for p in params], steps))
            return loss

        loss = super()._probe(seen)
        _, square, size = torch.stack(rows).sum(1).max(0).values  # as the law, every probe alike
        news = torch.stack([row[:, 0] for row in rows]) / (square * size).sqrt()
        if not news.isfinite().all():
            return loss
        self.sums = self.law.average * self.sums + news
        e0, e1 = self.sums
        if e0.sum() > 0 and self._schedule >= self.law.hold * self._now.peak:
            differ = torch.where(e0 > 0, (e1 / e0).clamp(-3, 3) - e1.sum() / e0.sum(), 0.0)
            self.logs += self.law.gain / 10 * differ
            self.logs = (self.logs - self.logs.mean()).clamp(-math.log(3), math.log(3))
        return loss


# One run


def schedule(name: str, steps: int) -> Callable[[int], float]:
    """Constant, or a linear decay to nothing, for "linear" after a warm-up over a tenth."""
    if name == "constant":
        return lambda t: 1.0
    rise = 0 if name == "decay" else max(1, steps // 10)
    return lambda t: min((t + 1) / max(rise, 1), (steps - t) / (steps - rise))


@torch.no_grad()
def validate(model: nn.Module, data: Data) -> tuple[float, float]:
    """The loss and the accuracy."""
    model.eval()
    losses, right = [], []
    for x, y in zip(data.val_inputs.split(250), data.val_labels.split(250), strict=True):
        scores = model(x).flatten(0, -2)
        losses.append(F.cross_entropy(scores, y.flatten(), reduction="none"))
        right.append(scores.argmax(-1) == y.flatten())
    model.train()
    return float(torch.cat(losses).mean()), float(torch.cat(right).float().mean())


def run(
    task: Task,
    args: argparse.Namespace,
    make: Callable[[nn.Module, int], Optimizer],
    schedule_name: str,
    seed: int,
    batch: int,
) -> dict[str, Any]:
    """Trains once, and returns what is worth a line."""
    data = task.load(args)
    torch.manual_seed(seed)
    model = task.model(args).train()
    optimizer = make(model, task.steps)
    scheduler = LambdaLR(optimizer, schedule(schedule_name, task.steps))
    two_modes = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    if two_modes:
        optimizer.train()
    start, losses = time.process_time(), []
    batches = data.batches(batch, seed)
    for _ in range(task.steps):
        x, y = next(batches)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
        scheduler.step()
        if not math.isfinite(losses[-1]):
            break
    seconds = time.process_time() - start
    if two_modes:
        optimizer.eval()
        if any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules()):
            with torch.no_grad():  # the statistics at the average, as its authors ask for
                for _ in range(50):
                    model(next(batches)[0])
    val_loss, accuracy = validate(model, data)
    tail = losses[-max(1, task.steps // 10) :]
    result = {
        "val_loss": val_loss if math.isfinite(val_loss) else None,
        "accuracy": accuracy,
        "train_loss": sum(tail) / len(tail) if math.isfinite(sum(tail)) else None,
        "seconds": round(seconds, 2),
    }
    if probes := getattr(optimizer, "probes", None):
        result["probes"] = [[p.step, float(f"{p.rate:.3g}"), round(p.r, 3)] for p in probes]
    return result


def _adamw(params: Any, lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)


def _sgd(params: Any, lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def optimizers(laws: list[str]) -> dict[str, Callable[[nn.Module, int], Optimizer]]:
    """The optimizers by name."""

    def secant(
        law: str,
        base_of: Callable[[Any, float], Optimizer] = _adamw,
        kind: type[Secant] = Secant,
    ) -> Callable[[nn.Module, int], Optimizer]:
        options = {key: float(value) for key, value in (x.split("=") for x in law.split())}
        every = int(options.pop("every", 20))
        lr = options.pop("lr", 1e-3)

        def make(model: nn.Module, steps: int) -> Optimizer:
            groups = [{"params": [p]} for p in model.parameters()]
            base = base_of(groups if kind is LayerSecant else model.parameters(), lr)
            return kind(base, every, model=model, law=Law(**options))

        return make

    def tuned(
        base_of: Callable[[Any, float], Optimizer], lr: float
    ) -> Callable[[nn.Module, int], Optimizer]:
        return lambda model, steps: base_of(model.parameters(), lr)

    def prodigy(model: nn.Module, steps: int) -> Optimizer:
        from prodigyopt import Prodigy

        return Prodigy(model.parameters())

    def schedule_free(model: nn.Module, steps: int) -> Optimizer:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(model.parameters())

    return {
        **{f"adamw {lr:g}": tuned(_adamw, lr) for lr in GRID},
        "prodigy": prodigy,
        "schedulefree": schedule_free,
        **{f"secant {law}".strip(): secant(law) for law in laws},
        "start only": secant("climb=0 fall=1"),
        "losses alone": secant("", kind=ForwardSecant),
        "factors": secant("", kind=LayerSecant),
        **{f"sgd {lr:g}": tuned(_sgd, lr) for lr in SGD_GRID},
        **{f"secant-sgd {law}".strip(): secant(law, _sgd) for law in laws},
    }


def report(file: Path) -> None:
    """Prints the gains in parts of those of the base with the best learning rate of the grid."""
    gains: dict[Row, dict[str, dict[int, float]]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        loss, name = line["val_loss"], line["optimizer"]
        chance = math.log(TASKS[line["task"]].classes)
        row = "sgd" in name, line["task"], line["batch"], line["schedule"]
        gain = 0.0 if loss is None else max(chance - loss, 0.0)
        gains.setdefault(row, {}).setdefault(name, {})[line["seed"]] = gain
    for base, sgd, grid in (("adamw", False, GRID), ("sgd", True, SGD_GRID)):
        tuned = [f"{base} {lr:g}" for lr in grid]
        rows = {key[1:]: row for key, row in sorted(gains.items()) if key[0] == sgd}
        names = sorted({name for row in rows.values() for name in row} - set(tuned))
        head = ["task, batch, schedule", f"best {base}", "lr", "its neighbours", *names]
        print("\n|", " | ".join(head), "|")
        print("|---" * len(head) + "|")
        for (task, batch, kind), row in rows.items():
            if best := _best(row, tuned):
                cells = [f"{statistics.fmean(row[best].values()):.3f}", best.split()[1]]
                cells.append(_neighbours(row, tuned, best))
                cells += [_relative(row.get(name, {}), row[best]) for name in names]
                print(f"| {task}, {batch}, {kind} |", " | ".join(cells), "|")
    for times in (1, 4):
        rows = {
            key[1:]: row
            for key, row in gains.items()
            if not key[0] and key[2] == times * TASKS[key[1]].batch and key[1] not in NOISY
        }
        for name, other in COMPARED:
            _compare(rows, name, other, times)


COMPARED = [
    *(("secant", peer) for peer in ("prodigy", "schedulefree")),
    *((variant, "secant") for variant in ("losses alone", "factors")),
]
NOISY = ("encoder",)
"""Tasks whose differences are mostly noise."""


def _compare(
    rows: dict[tuple[str, int, str], dict[str, dict[int, float]]], name: str, other: str, times: int
) -> None:
    """Prints the mean over the tasks of a difference, of rows with three seeds, with its 95 %
    interval (t distribution over the tasks)."""
    tasks: dict[str, list[float]] = {}
    for (task, _, _), row in rows.items():
        tuned = row.get(_best(row, [f"adamw {lr:g}" for lr in GRID]), {})
        seeds = row.get(name, {}).keys() & row.get(other, {}).keys() & tuned.keys()
        if len(seeds) > 2:
            difference = sum(row[name][seed] - row[other][seed] for seed in seeds)
            tasks.setdefault(task, []).append(difference / sum(tuned[seed] for seed in seeds))
    means = [statistics.fmean(found) for found in tasks.values()]
    if len(means) > 1:
        found = interval(means)
        print(
            f"\n{name} - {other}, batch x {times}, {len(means)} tasks: {found.mean:+.3f} "
            f"({found.low:+.3f} to {found.high:+.3f})"
        )


Row = tuple[bool, str, int, str]
"""Whether over SGD, the task, the batch size and the schedule."""


def _best(row: dict[str, dict[int, float]], tuned: list[str]) -> str:
    """The name of the tuned optimizer with the largest mean gain; "" if there is none."""
    tried = [name for name in tuned if name in row]
    return max(tried, key=lambda name: statistics.fmean(row[name].values()), default="")


def _neighbours(row: dict[str, dict[int, float]], tuned: list[str], best: str) -> str:
    """What the base keeps at the rates beside the best."""
    at = tuned.index(best)
    names = [tuned[i] if 0 <= i < len(tuned) else "" for i in (at - 1, at + 1)]
    return " ".join(f"{_ratio(row[x], row[best]):.3f}" if x in row else "–" for x in names)


def _ratio(found: dict[int, float], best: dict[int, float]) -> float:
    seeds = found.keys() & best.keys()
    if not seeds:
        return math.nan
    return sum(found[seed] for seed in seeds) / sum(best[seed] for seed in seeds)


def _relative(found: dict[int, float], best: dict[int, float]) -> str:
    """The mean over the seeds, from three on its 95 % interval, the seeds are paired; the worst."""
    seeds = sorted(found.keys() & best.keys())
    if not seeds:
        return ""
    mean = statistics.fmean(best[seed] for seed in seeds)
    text = f"{_ratio(found, best):.3f}"
    if len(seeds) > 2:
        differences = interval([(found[seed] - best[seed]) / mean for seed in seeds])
        text += f" ± {differences.high - differences.mean:.3f}"
    worst = min(found[seed] for seed in seeds) / mean
    return f"{text} ({worst:.2f})" if len(seeds) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines, which new runs are appended to")
    for name in ("text", "mnist", "cifar", "reviews", "encoder"):
        parser.add_argument(f"--{name}", help="path or Hub id")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of optimizers")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--laws", nargs="*", default=[""], help='such as "sigma=1.8 every=10"')
    parser.add_argument("--batch", type=float, default=1.0, help="times the task's batch size")
    parser.add_argument("--report", action="store_true", help="print the table of the file")
    args = parser.parse_args()
    if args.report:
        report(args.file)
        return
    torch.set_num_threads(1)
    done = set()
    if args.file.exists():
        done = {json.loads(line)["key"] for line in args.file.read_text().splitlines()}
    for seed in args.seeds:
        for name in args.tasks:
            task = TASKS[name]
            if task.data and not getattr(args, task.data):
                continue
            for kind in args.schedules:
                for label, make in optimizers(args.laws).items():
                    if not any(fnmatchcase(label, pattern) for pattern in args.only):
                        continue
                    if label == "schedulefree" and kind != "constant":
                        continue
                    batch = int(task.batch * args.batch)
                    key = f"{name} {batch} {kind} {label} {seed}"
                    if key in done:
                        continue
                    result = run(task, args, make, kind, seed, batch)
                    line = {"key": key, "task": name, "batch": batch, "schedule": kind}
                    line |= {"optimizer": label, "seed": seed, **result}
                    with args.file.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(key, {k: v for k, v in result.items() if k != "probes"}, flush=True)


if __name__ == "__main__":
    main()
