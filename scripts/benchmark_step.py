"""What an optimizer's step costs, beside its peers on the same tensors in the same run.

    python scripts/benchmark_step.py --model resnet50 vit_small bert_base llama_0.5b
    python scripts/benchmark_step.py --only "adamlip*" "adamw*" --threads 1
    python scripts/benchmark_step.py --model many_tensors --rounds 5 --only "adam *" "adamlip *"

Rows: our six as a loop, foreach and fused, with each history they can keep; `Lipschitz` over Adam;
and the optimizers of torch, timm, schedulefree, prodigyopt, pytorch_optimizer and, on a GPU,
bitsandbytes (`pip install 'hf-adalip[benchmark]'`; what is not installed is listed as such).
Tensors: those of the model (many_tensors: 10,000 of 8×8), with random values. Nothing is
downloaded.

In a round, every row steps the same parameters once, in an order drawn anew, with gradients that
are new in value and in place as after a backward pass; making them is not timed. A step is timed
on its own, on a GPU until the device is done, so that Python's time shows where it is the longer.
What one row cost in a round is divided by what torch's fused Adam (for AdaLip and other kinds of
SGD: fused SGD; both with momentum) cost in the same round; the table has the median of these
ratios, and in brackets their quartiles. Where not all rows fit into memory, they are measured in
groups, each with its reference.

The other columns:

    state       bytes for a parameter, of all tensors that the optimizer's state refers to
    peak extra  MiB that a step has allocated at most beyond what was there before and stays: on a
                GPU torch.cuda.max_memory_allocated, on a CPU what torch.profiler (profile_memory)
                is told by torch's allocator; in a step that is not timed
    syncs       of host and device in a step, that torch.cuda.set_sync_debug_mode warns of
    first step  seconds: it makes the state and compiles, from empty caches

Writes step-MODEL.json, .md (the table) and .png (bytes of state against ratio) to --output.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    add_arguments,
    describe_model,
    free_memory,
    groups,
    in_groups,
    markdown,
    record,
    seconds,
    spread,
    synchronize,
    take_turns,
    write,
)
from peers import ADAM, SGD, Named, Row, all_rows, select
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_adalip.optim.forms import fused

# Words that have to be moved for a parameter, beside those of the reference: AdamLip reads g and
# its history and writes the history before it steps as Adam does, with p, g and the moments read
# and p and the moments written. AdaLip with momentum the same before SGD's step.
FLOORS = {ADAM: 10 / 7, SGD: 8 / 5}
PACKAGES = ("triton", "timm", "transformers", "schedulefree", "prodigyopt")
PACKAGES += ("pytorch_optimizer", "bitsandbytes")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, **sizes, **heads))


def many_tensors() -> nn.Module:
    """What a step costs for each tensor, whatever is in it."""
    return nn.ParameterList(nn.Parameter(torch.empty(8, 8)) for _ in range(10_000))


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": partial(timm_model, "resnet50"),
    "vit_small": partial(timm_model, "vit_small_patch16_224"),
    "bert_base": bert_base,
    "llama_0.5b": llama,
    "many_tensors": many_tensors,
}


def known_model(name: str) -> str:
    """The name of one of MODELS, or of timm's."""
    if name not in MODELS:
        import timm

        if not timm.is_model(name):
            near = difflib.get_close_matches(name, [*MODELS, *timm.list_models()], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MODELS)}"
            raise argparse.ArgumentTypeError(f"timm has no model {name!r}; {hint}")
    return name


def shapes(model: str) -> dict[str, torch.Size]:
    """Of a model's parameters, by name; one of MODELS, or any of timm's."""
    with torch.device("meta"):
        made = MODELS[model]() if model in MODELS else timm_model(model)
    return {name: param.shape for name, param in made.named_parameters()}


class Tensors:
    """Parameters, and gradients that are cut out of one pool of random numbers, at random."""

    def __init__(self, shapes: Mapping[str, torch.Size], args: argparse.Namespace) -> None:
        options = {"device": args.device, "dtype": DTYPES[args.dtype]}
        torch.manual_seed(args.seed)
        self.named: Named = [
            (name, nn.Parameter(torch.randn(shape, **options).mul_(0.02)))
            for name, shape in shapes.items()
        ]
        self._room = 2**20
        largest = max(shape.numel() for shape in shapes.values())
        self._pool = torch.randn(largest + self._room, **options).mul_(0.01)
        self._offsets = random.Random(args.seed)

    def new_gradients(self) -> None:
        for _, param in self.named:
            param.grad = None
        for _, param in self.named:
            start = self._offsets.randrange(self._room)
            param.grad = self._pool[start : start + param.numel()].view_as(param).clone()


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def state_bytes(optimizer: Optimizer) -> int:
    """Of the memory behind all tensors in state and groups, parameters and gradients apart."""
    both = [optimizer, getattr(optimizer, "optimizer", None)]  # Lipschitz has a base
    held = [(own.state, own.param_groups) for own in both if own is not None]
    storages = [tensor.untyped_storage() for tensor in _tensors(held)]
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        for tensor in (param, param.grad):
            if tensor is not None:
                found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def peak_extra(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step needs beyond those that are there."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes that there is no GPU
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if _is_memory(event)]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def _is_memory(event: Mapping[str, Any]) -> bool:
    return event["name"] == "[memory]" and event["args"]["Device Type"] == 0  # the CPU


def synchronizations(optimizer: Optimizer, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def measure(
    group: Sequence[Row], tensors: Tensors, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results of a group of rows, the first of which is their reference; and why some have none."""
    device, reference = args.device, group[0]
    optimizers: dict[str, Optimizer] = {}
    first: dict[str, float] = {}
    failed = {}
    for row in group:
        tensors.new_gradients()
        try:
            optimizer = row.make(tensors.named)
            first[row.name] = seconds(optimizer.step, device)
        except Exception as error:
            if row is reference:
                raise
            failed[row.name] = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        else:
            optimizers[row.name] = optimizer

    def step(optimizer: Optimizer) -> dict[str, float]:
        tensors.new_gradients()
        return {"seconds": seconds(optimizer.step, device)}

    runs = {name: partial(step, optimizer) for name, optimizer in optimizers.items()}
    times = {n: t["seconds"] for n, t in take_turns(runs, args.rounds, args.seed).items()}
    parameters = sum(param.numel() for _, param in tensors.named)
    results = []
    for name, optimizer in optimizers.items():
        ratios = [a / b for a, b in zip(times[name], times[reference.name], strict=True)]
        results.append(
            {
                "name": name,
                "reference": reference.name,
                "ms": spread([1e3 * t for t in times[name]]),
                "ratio": spread(ratios),
                "state_bytes_per_parameter": state_bytes(optimizer) / parameters,
                "peak_extra_bytes": peak_extra(optimizer.step, device),
                "synchronizations": synchronizations(optimizer, device),
                "first_step_seconds": first[name],
                "rounds_ms": [1e3 * t for t in times[name]],
            }
        )
    return results, failed


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        ratio, syncs = row["ratio"], row["synchronizations"]
        cells.append(
            [
                row["name"],
                f"{row['ms']['median']:.2f}",
                f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                row["reference"],
                f"{row['state_bytes_per_parameter']:.2f}",
                f"{row['peak_extra_bytes'] / 2**20:.2f}",
                "-" if syncs is None else str(syncs),
                f"{row['first_step_seconds']:.2f}",
            ]
        )
    header = ["step of", "ms", "ratio [quartiles]", "to", "state, B/param", "peak extra, MiB"]
    return markdown([*header, "syncs", "first step, s"], cells)


def plot(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """State against ratio, a panel for each reference; labels are moved up where they overlap."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no plot: {error}: pip install 'hf-adalip[benchmark]'", file=sys.stderr)
        return
    references = list(dict.fromkeys(row["reference"] for row in rows))
    figure = Figure(figsize=(9 * len(references), 9), layout="constrained")
    panels = figure.subplots(1, len(references), squeeze=False)[0]
    for axes, reference in zip(panels, references, strict=True):
        own = [row for row in rows if row["reference"] == reference]
        x = [row["state_bytes_per_parameter"] for row in own]
        y = [row["ratio"]["median"] for row in own]
        span = max(max(y) / min(y), 2.0)
        axes.set_yscale("log", base=2)
        width = 0.3 * (max(x) - min(x) + 4)  # of a label
        axes.set_xlim(min(x) - 0.1 * width, max(x) + width)
        axes.set_ylim(min(y) / span**0.05, max(y) * span**0.15)
        axes.axhline(FLOORS[reference], color="tab:green", linestyle="--", linewidth=1)
        axes.annotate(
            f"floor of {'AdamLip' if reference == ADAM else 'AdaLip'}, {FLOORS[reference]:.2f}",
            xy=(1, FLOORS[reference]),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2),
            textcoords="offset points",
            ha="right",
            color="tab:green",
        )
        last: list[tuple[float, float]] = []  # labels placed: where, and how high
        for row in sorted(own, key=lambda row: row["ratio"]["median"]):
            at = (row["state_bytes_per_parameter"], row["ratio"]["median"])
            colour = "tab:blue" if "Lip" in row["name"] else "tab:gray"
            low, high = at[1] - row["ratio"]["q1"], row["ratio"]["q3"] - at[1]
            axes.errorbar(*at, yerr=[[low], [high]], fmt="o", markersize=4, color=colour)
            near = [height for place, height in last if abs(place - at[0]) < width]
            height = max([at[1], *(h * span**0.022 for h in near)])
            last.append((at[0], height))
            axes.annotate(
                row["name"],
                at,
                (at[0] + 0.08 * width, height),
                va="center",
                fontsize=8,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour},
            )
        axes.set_xlabel("bytes of state for a parameter")
        axes.set_ylabel(f"time of a step ÷ {reference}'s")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def benchmark(model: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    sizes = shapes(model)
    parameters = sum(size.numel() for size in sizes.values())
    known = {row.name: row for row in all_rows(args.layers)}
    not_run = {row.name: why for row in rows if (why := row.missing(args.device))}
    present = [row for row in rows if row.name not in not_run]
    references = {row.reference: known[row.reference] for row in present}
    item = DTYPES[args.dtype].itemsize
    # Beside the state: parameters, gradients, the pool, and a margin for what a step allocates.
    free = 0.8 * free_memory(args.device) / (item * parameters)
    found, too_large = groups(present, references, free - 5)
    not_run |= {row.name: f"does not fit into {free:.1f} × the parameters" for row in too_large}
    found = [group for group in found if sum(r.words for r in group) <= free - 5]
    if not found:
        print(f"{model}: left out, as {free:.1f} × its parameters is all that fits here")
        return
    tensors = Tensors(sizes, args)
    results, failed = in_groups(model, found, lambda group: measure(group, tensors, args))
    ordered = [results[name] for name in known if name in results]
    whole = record(args, PACKAGES) | {"dtype": args.dtype, "model": describe_model(tensors.named)}
    name = f"step-{model}"
    write(args.output, name, whole | {"rows": ordered, "not_run": not_run | failed}, table(ordered))
    where = whole["machine"].get("gpu", whole["machine"]["processor"])
    plot(args.output / f"{name}.png", f"{model}, {args.dtype}, {where}", ordered)


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
        help=f"{', '.join(MODELS)}, or any of timm's (default: resnet50)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    add_arguments(parser, layers="tensor", only=["*"])
    args = parser.parse_args(argv)
    rows = select(parser, all_rows(args.layers), args.only)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as caches:
        os.environ |= {"XDG_CACHE_HOME": caches, "TRITON_CACHE_DIR": caches}
        fused.missing(torch.device(args.device))  # for which Triton compiles too
        for model in args.model:
            benchmark(model, rows, args)


if __name__ == "__main__":
    main()
