"""What our optimizers add to a whole training step, in per cent of the step with AdamW.

    python scripts/benchmark_training.py --model resnet50 vit_small bert_base --batch_size 4

A step is zero_grad, forward, backward and optimizer.step(), all timed together, in training mode
with dropout. The data are one batch of random values of the usual shape, already on the device,
with random labels: what a step takes does not depend on the values. Weights are random as well,
and nothing is downloaded. BERT-base is a classifier of two classes, of sequences of 128 tokens.

In a round, every optimizer takes one step on the same model, in an order drawn anew. Its time is
divided by that of torch's fused AdamW in the same round; the table has the median overhead, and in
brackets its quartiles. On a CPU the step itself is timed, too, and the column "by step" has what it
takes longer than AdamW's, in per cent of the whole: forward and backward passes are the same for
all, and their noise is not in it. On a GPU the device still works on the backward pass while
Python runs the step, so that there only the whole tells.

Where the states do not fit into half of the free memory, the rows are measured in groups, each
with AdamW. Writes training-MODEL.json and .md (the table) to --output.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmark_step import MODELS, PACKAGES, known_model, timm_model
from measuring import (
    add_arguments,
    at_least,
    describe_model,
    free_memory,
    groups,
    in_groups,
    markdown,
    record,
    spread,
    synchronize,
    take_turns,
    write,
)
from peers import Named, Row, all_rows, select
from torch import Tensor, nn
from torch.optim import Optimizer

ADAMW = "AdamW fused"
ONLY = [
    "AdamW *",
    "*Lip foreach",
    "*LipU foreach",
    "*Lip fused",
    "*LipU fused",
    "*Lip fused sketch",
]


def training(model: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model, and its loss on a batch."""
    torch.manual_seed(args.seed)
    size = args.batch_size
    with args.device:
        if model == "bert_base":
            net = MODELS[model]().train()
            tokens = torch.randint(net.config.vocab_size, (size, args.sequence_length))
            labels = torch.randint(2, (size,))
            return net, lambda: net(input_ids=tokens, labels=labels).loss
        net = (MODELS[model]() if model in MODELS else timm_model(model)).train()
        if hasattr(net, "set_input_size"):  # a transformer's position embedding has one
            net.set_input_size(img_size=args.image_size)
        images = torch.randn(size, 3, args.image_size, args.image_size)
        labels = torch.randint(net.num_classes, (size,))
        return net, lambda: nn.functional.cross_entropy(net(images), labels)


def one_step(
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of the whole, and of the optimizer's part, which a GPU's queue makes meaningless."""
    synchronize(device)
    start = time.perf_counter()
    optimizer.zero_grad()
    with precision():
        value = loss()
    value.backward()
    before = time.perf_counter()
    optimizer.step()
    synchronize(device)
    end = time.perf_counter()
    return {"whole": end - start, "step": end - before}


def measure(
    group: Sequence[Row],
    named: Named,
    step: Callable[[Optimizer], dict[str, float]],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results of a group of rows, the first of which is AdamW; and why some have none."""
    optimizers: dict[str, Optimizer] = {}
    failed = {}
    for row in group:
        try:
            optimizer = row.make(named)
            step(optimizer)
        except Exception as error:
            if row is group[0]:
                raise
            failed[row.name] = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        else:
            optimizers[row.name] = optimizer
    runs = {name: partial(step, optimizer) for name, optimizer in optimizers.items()}
    times = take_turns(runs, args.rounds, args.seed)
    base = times[ADAMW]
    results = []
    for name, own in times.items():
        whole = [100 * (a / b - 1) for a, b in zip(own["whole"], base["whole"], strict=True)]
        result = {
            "name": name,
            "ms": spread([1e3 * t for t in own["whole"]]),
            "overhead_percent": spread(whole),
            "rounds_ms": [1e3 * t for t in own["whole"]],
        }
        if args.device.type == "cpu":
            middle = spread(base["whole"])["median"]
            more = [100 * (a - b) / middle for a, b in zip(own["step"], base["step"], strict=True)]
            result["step_ms"] = spread([1e3 * t for t in own["step"]])
            result["overhead_by_step_percent"] = spread(more)
        results.append(result)
    return results, failed


def percent(found: Mapping[str, float]) -> str:
    return f"{found['median']:+.2f} [{found['q1']:+.2f}, {found['q3']:+.2f}]"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["training with", "ms", "overhead, % [quartiles]"]
    cells = [[r["name"], f"{r['ms']['median']:.1f}", percent(r["overhead_percent"])] for r in rows]
    if "step_ms" in rows[0]:
        header += ["step, ms", "by step, %"]
        for cell, row in zip(cells, rows, strict=True):
            by_step = percent(row["overhead_by_step_percent"])
            cell += [f"{row['step_ms']['median']:.2f}", by_step]
    return markdown(header, cells)


def benchmark(model: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    not_run = {row.name: why for row in rows if (why := row.missing(args.device))}
    present = [replace(row, reference=ADAMW) for row in rows if row.name not in not_run]
    order = [row.name for row in all_rows(args.layers)]
    reference = next(row for row in all_rows(args.layers) if row.name == ADAMW)
    net, loss = training(model, args)
    named = [(name, param) for name, param in net.named_parameters() if param.requires_grad]
    precision = partial(
        torch.autocast, args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"
    )

    def step(optimizer: Optimizer) -> dict[str, float]:
        return one_step(optimizer, loss, precision, args.device)

    parameters = sum(param.numel() for _, param in named)
    words = 0.5 * free_memory(args.device) / (4 * parameters)
    found, too_large = groups(present, {ADAMW: reference}, words)
    not_run |= {row.name: f"does not fit into {words:.1f} × the parameters" for row in too_large}
    results, failed = in_groups(model, found, lambda group: measure(group, named, step, args))
    ordered = [results[name] for name in order if name in results]
    whole = record(args, PACKAGES) | {"model": describe_model(named), "not_run": not_run | failed}
    whole |= {"dtype": "float32" if args.dtype == "float32" else "float32 and autocast to bfloat16"}
    whole |= {"batch_size": args.batch_size}
    size = "sequence_length" if model == "bert_base" else "image_size"
    whole |= {size: getattr(args, size)}
    write(args.output, f"training-{model}", whole | {"rows": ordered}, table(ordered))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        type=known_model,
        default=["resnet50"],
        metavar="NAME",
        help="resnet50, vit_small, bert_base, or any of timm's (default: resnet50)",
    )
    parser.add_argument("--batch_size", type=at_least(2), help="(4 on a CPU, 64 on a GPU)")
    parser.add_argument("--image_size", type=at_least(1), default=224, help="(224)")
    parser.add_argument("--sequence_length", type=at_least(1), default=128, help="(128)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the forward pass: bfloat16 for autocast; parameters are float32 (float32)",
    )
    add_arguments(parser, layers="module", only=ONLY)
    args = parser.parse_args(argv)
    if "llama_0.5b" in args.model:
        parser.error("llama_0.5b is for benchmark_step.py only")
    rows = select(parser, all_rows(args.layers), args.only)
    args.batch_size = args.batch_size or (64 if args.device.type == "cuda" else 4)
    if args.threads:
        torch.set_num_threads(args.threads)
    for model in args.model:
        benchmark(model, rows, args)


if __name__ == "__main__":
    main()
