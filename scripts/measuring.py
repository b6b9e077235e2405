"""What the benchmarks share: rows that take turns, their spread, and a record of where it was."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import Row
from torch import nn

from hf_adalip.version import __version__

try:
    import psutil
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'hf-adalip[benchmark]'") from error

WARM_UP = 3  # rounds that do not count


def at_least(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return parse


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"cpu or cuda, got {text!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU here")
    return found


def add_arguments(parser: argparse.ArgumentParser, *, layers: str, only: Sequence[str]) -> None:
    """What both benchmarks take."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--only",
        nargs="+",
        default=only,
        metavar="PATTERN",
        help=f"rows by name, with * and ? (default: {' '.join(only)}); references come along",
    )
    parser.add_argument("--rounds", type=at_least(2), default=20, help="(20)")
    parser.add_argument("--threads", type=at_least(1), help="of torch; default: torch's own number")
    parser.add_argument("--device", type=device, default=default, help=f"cpu or cuda ({default})")
    parser.add_argument(
        "--layers", choices=["tensor", "module"], default=layers, help=f"({layers})"
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), metavar="DIR")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """What it takes, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    runs: Mapping[str, Callable[[], dict[str, float]]], rounds: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Every run once in a round, in an order drawn anew: a busy machine is then busy for all, and
    none always finds the caches as the same other one has left them.

    A run returns its measurements by name; what is returned has a list of each.
    """
    order = random.Random(seed)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(-WARM_UP, rounds):
        for name in order.sample(list(runs), len(runs)):
            for key, value in runs[name]().items():
                if number >= 0:
                    found[name].setdefault(key, []).append(value)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def free_memory(device: torch.device) -> int:
    """Bytes, after what Python no longer needs was given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def groups(
    rows: Sequence[Row], references: Mapping[str, Row], words: float
) -> tuple[list[list[Row]], list[Row]]:
    """Rows that fit into `words` of state for each parameter together with their reference, which
    comes first in each group; and those that do not fit alone.
    """
    found: list[list[Row]] = []
    too_large = []
    for name, reference in references.items():
        group = [reference]
        for row in rows:
            if row.reference != name or row.name == name:
                continue
            if reference.words + row.words > words:
                too_large.append(row)
                continue
            if sum(r.words for r in group) + row.words > words:
                found.append(group)
                group = [reference]
            group.append(row)
        found.append(group)
    return found, too_large


Results = list[dict[str, Any]]


def in_groups(
    model: str,
    found: Sequence[Sequence[Row]],
    measure: Callable[[Sequence[Row]], tuple[Results, dict[str, str]]],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results by name (a reference's are those of its first group), and why some rows have none."""
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for number, group in enumerate(found, 1):
        print(f"{model}: {len(group)} rows, group {number} of {len(found)}", file=sys.stderr)
        measured, errors = measure(group)
        gc.collect()
        failed |= errors
        for result in measured:
            results.setdefault(result["name"], result)
    return results, failed


def describe_model(named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, int]:
    sizes = [param.numel() for _, param in named]
    return {"tensors": len(sizes), "parameters": sum(sizes), "largest": max(sizes)}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def record(args: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """Command, date, machine and versions: what a number is worth nothing without."""
    versions = {"python": platform.python_version(), "hf_adalip": __version__}
    versions |= {name: found for name in packages if (found := _version(name)) is not None}
    versions["torch"] = torch.__version__  # with its build
    machine = {"processor": _processor(), "cpus": os.cpu_count(), "system": platform.system()}
    machine["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    if args.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "device": str(args.device),
        **({"layers": args.layers} if "layers" in args else {}),
        "rounds": args.rounds,
        "seed": args.seed,
    }


def caption(found: Mapping[str, Any], name: str) -> str:
    """A line under a table."""
    machine, model = found["machine"], found["model"]
    where = (
        machine.get("gpu")
        or f"{machine['processor']}, {found['threads']} of {machine['cpus']} threads"
    )
    return (
        f"{name}: {model['tensors']} tensors, {model['parameters'] / 1e6:.1f} M parameters, the "
        f"largest tensor {model['largest'] / 1e6:.2f} M; {found['dtype']}, "
        f'layers="{found["layers"]}"; {where}, torch {found["versions"]["torch"]}, '
        f"{found['date']}; medians of {found['rounds']} rounds. `{found['command']}`"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is as legible on a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [[*map(str.ljust, row, widths)] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folder: Path, name: str, found: Mapping[str, Any], table: str) -> None:
    """NAME.json and NAME.md, and the table to the terminal."""
    text = f"{table}\n\n{caption(found, name)}\n"
    if found["not_run"]:
        text += "\nNot run:\n\n" + "".join(f"- {n}: {why}\n" for n, why in found["not_run"].items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
