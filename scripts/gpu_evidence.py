"""What only a GPU can show, in stages of minutes; run it again until nothing is left.

    python scripts/gpu_evidence.py --data /path/to/datasets --output docs/results/gpu
    python scripts/gpu_evidence.py --list
    python scripts/gpu_evidence.py --only "paper_*" --minutes 8

Stages, in this order:

    kernels          tests/optim/test_gpu_kernels.py
    fp16             AdamLip under GradScaler: a step that overflows changes nothing, S stays finite
    cuda_graph       a captured step of AdamLip is the step, bit for bit
    no_sync          a step, with gradients clipped, makes the host wait for nothing
    release          gradients released within backward give the same parameters
    step-MODEL       scripts/benchmark_step.py
    training-MODEL   scripts/benchmark_training.py
    STUDY-OPTIMIZER  the paper's runs: all learning rates of an optimizer, and as many seeds as are
                     asked for, trained together (hf_adalip.experiments.ensemble). Their rows are in
                     OUTPUT/STUDY/results.jsonl, which `hf-adalip report OUTPUT/STUDY` reads.

A stage writes OUTPUT/STAGE.json when it is finished or has failed, and is not run again while that
is there, unless it was with --toy and is now without, or with other --seeds. A program that is cut
off is run again by the next call, whole; one of the paper's runs saves its state after each epoch,
and goes on from there. A call ends after --minutes, or with the epoch that it is in. Nothing is
downloaded: --data has the folders mnist, cifar10 and cifar100. Without a GPU, --device cpu --toy
runs everything small, to see that it works.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adalip import AdamLip, release_gradients
from hf_adalip.experiments.ensemble import Ensemble, Member
from hf_adalip.experiments.reading import load_study
from hf_adalip.experiments.study import ROWS, STUDY, Study
from hf_adalip.experiments.trial import row_of
from hf_adalip.files import whole
from hf_adalip.recipe.image.data import DIGITS, load_image_dataset
from hf_adalip.recipe.image.options import parse
from hf_adalip.version import __version__

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

MODELS = ["resnet50", "vit_small", "bert_base", "llama_0.5b"]
STUDIES = ["paper_mnist", "paper_cifar10", "paper_cifar100"]

Found = dict[str, Any]
Stage = Callable[[argparse.Namespace, float], "Found | None"]
"""From the options and the time by which it has to end, what it found; None if it goes on later."""


def stages(args: argparse.Namespace) -> Iterator[tuple[str, Stage]]:
    """All of them by name, in order."""
    yield "kernels", kernels
    for check in (fp16, cuda_graph, no_sync, release):
        yield check.__name__, check
    for model in ["resnet18"] if args.toy else MODELS:
        yield f"step-{model}", partial(benchmark, "step", model)
    for model in [] if args.toy else MODELS[:3]:
        yield f"training-{model}", partial(benchmark, "training", model)
    for name in STUDIES[:1] if args.toy else STUDIES:
        study = study_of(name, args)
        for optimizer in dict.fromkeys(cell.optimizer for cell in study.cells()):
            yield f"{name}-{optimizer}", partial(paper, study, optimizer)


# Programs of their own


def program(args: argparse.Namespace, command: Sequence[str], ends: float) -> Found | None:
    """What a program came to; one that is not done in a whole call's time has failed."""
    left = max(1.0, ends - time.monotonic())
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        whole_call = left > 0.95 * 60 * args.minutes
        return {"status": None, "error": f"not done after {left:.0f} s"} if whole_call else None
    tail = (done.stdout + done.stderr).strip().splitlines()[-20:]
    return {"status": done.returncode, "command": ["python", *command], "tail": tail}


def kernels(args: argparse.Namespace, ends: float) -> Found | None:
    chosen = ["-m", "not slow"] if args.toy else []
    return program(args, ["-m", "pytest", "-q", "tests/optim/test_gpu_kernels.py", *chosen], ends)


def benchmark(kind: str, model: str, args: argparse.Namespace, ends: float) -> Found | None:
    """The table is in OUTPUT too."""
    small = ["--rounds", "2", "--only", "adamlip foreach"] if args.toy else []
    script, where = f"scripts/benchmark_{kind}.py", ["--output", str(args.output)]
    command = [script, "--model", model, "--device", args.device, *where, *small]
    return program(args, command, ends)


# Checks


def small_net(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 4)
    return nn.Sequential(*layers).to(device)


def batches(device: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator).to(device) for _ in range(count)]


def numbers(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and state, copied."""
    state = (x for own in optimizer.state.values() for x in own.values() if isinstance(x, Tensor))
    return [x.detach().clone() for x in (*net.parameters(), *state)]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def fp16(args: argparse.Namespace, ends: float) -> Found:
    if args.device == "cpu":
        return {"skipped": "fp16 with GradScaler is for a GPU"}
    net = small_net(args.device)
    optimizer = AdamLip(net.named_parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(args.device, init_scale=2.0**30, growth_interval=10)
    skipped = changed = 0
    for batch in batches(args.device, 100):
        with torch.autocast(args.device, torch.float16):
            loss = net(batch).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before, scale = numbers(net, optimizer), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            after = numbers(net, optimizer)
            changed += len(before) == len(after) and not equal(before, after)
    scales = [rate.scale for rate in optimizer.layer_learning_rates().values()]
    passed = skipped > 0 and not changed and all(0.1 <= scale <= 10 for scale in scales)
    return {"passed": passed, "skipped_steps": skipped, "changed_by_them": changed, "S": scales}


def cuda_graph(args: argparse.Namespace, ends: float) -> Found:
    if args.device == "cpu":
        return {"skipped": "CUDA graphs are for a GPU"}
    found = {}
    for form in ("foreach", "fused"):
        nets = [small_net(args.device) for _ in range(2)]
        eager, captured = (
            AdamLip(net.named_parameters(), lr=1e-3, capturable=True, **{form: True})
            for net in nets
        )
        graph = torch.cuda.CUDAGraph()
        for step in range(8):
            torch.manual_seed(step)
            for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
            eager.step()
            if step < 3:  # which makes the state, and compiles
                captured.step()
                continue
            if step == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):  # records the step, and does not take it
                    captured.step()
            graph.replay()
        found[form] = equal(numbers(nets[0], eager), numbers(nets[1], captured))
    return {"passed": all(found.values()), "bit_for_bit": found}


def no_sync(args: argparse.Namespace, ends: float) -> Found:
    if args.device == "cpu":
        return {"skipped": "what the host waits for, for a GPU"}
    net = small_net(args.device)
    optimizer = AdamLip(net.named_parameters(), lr=1e-3)
    for step, batch in enumerate(batches(args.device, 6)):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        try:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        except RuntimeError as error:  # what it waited for
            return {"passed": False, "step": step, "error": str(error)}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}


def release(args: argparse.Namespace, ends: float) -> Found:
    nets = [small_net(args.device) for _ in range(2)]
    plain, released = (AdamLip(net.named_parameters(), lr=1e-3) for net in nets)
    release_gradients(released)
    for batch in batches(args.device, 20):
        for net, optimizer in zip(nets, (plain, released), strict=True):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    return {"passed": all(torch.equal(x, y) for x, y in pairs)}


# The paper


def study_of(name: str, args: argparse.Namespace) -> Study:
    scale = {"seeds": args.seeds} if args.seeds else {}
    if args.toy:
        scale = {"seeds": 1, "epochs": 1, "images": 128, "eval_images": 64}
    return load_study(name, scale)


def paper(study: Study, optimizer: str, args: argparse.Namespace, ends: float) -> Found | None:
    """All runs of an optimizer; their rows replace those that are there."""
    cells = [cell for cell in study.cells() if cell.optimizer == optimizer]
    recipe = importlib.import_module(Path(study.script).stem).RECIPE
    options = {**study.arguments, "optim": optimizer}
    name = study.name.removeprefix("paper_")
    options["dataset_name"] = DIGITS if args.toy else str(args.data / name)
    training = parse(recipe, [f"--{key}={value}" for key, value in options.items()])
    data = load_image_dataset(
        training.dataset_name,
        training.image_column_name,
        training.label_column_name,
        training.max_train_samples,
        training.max_eval_samples,
    )
    members = [Member(cell.learning_rate, cell.seed) for cell in cells]
    ensemble = Ensemble(recipe, training, data, members, torch.device(args.device))
    folder = args.output / study.full_name
    state = folder / f"{optimizer}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        ensemble.load(state)
    while not ensemble.done:
        epoch = ensemble.seconds / max(1, len(ensemble.epochs))
        if time.monotonic() + 1.2 * epoch > ends:
            return None
        ensemble.train_epoch()
        ensemble.save(state)
    place = environment(args)
    about = {
        "dataset_name": data.name if args.toy else name,
        "dataset_fingerprint": data.fingerprint(),
        "train_samples": len(data.train),
        "eval_samples": len(data.test),
        **{key: place[key] for key in ("versions", "device")},
    }
    command = f"python scripts/gpu_evidence.py --data data --only {study.name}-{optimizer}"
    command += f" --seeds {args.seeds}" if args.seeds else ""
    rows = [
        row_of(
            study,
            cell,
            state="complete",
            error=None,
            seconds=ensemble.seconds / len(cells),
            command=command,
            median_scale=result["median_scale"],
            results={**result, **about},
        )
        for cell, result in zip(cells, ensemble.results(), strict=True)
    ]
    write_rows(folder, study, optimizer, rows)
    state.unlink()
    return {"runs": len(rows), "seconds": ensemble.seconds, "seeds": args.seeds}


def write_rows(folder: Path, study: Study, optimizer: str, rows: list[Found]) -> None:
    path = folder / ROWS
    kept = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["optimizer"] != optimizer]
    text = "".join(f"{line}\n" for line in [*kept, *map(json.dumps, rows)])
    whole(path, lambda partial: partial.write_text(text))
    # YAML is a superset of JSON
    whole(folder / STUDY, lambda partial: partial.write_text(json.dumps(study.as_run())))


# The command


def environment(args: argparse.Namespace) -> Found:
    cuda = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | ({"cuda": torch.version.cuda} if cuda else {})
        | {"hf_adalip": __version__},
        "toy": args.toy,
    }


def is_done(path: Path, args: argparse.Namespace) -> bool:
    """Whether a stage has been run as it is asked for."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return bool(found["toy"] == args.toy and found.get("seeds", args.seeds) == args.seeds)


def attempt(stage: Stage, args: argparse.Namespace, ends: float) -> Found | None:
    """What a stage found; an error is a finding too, and keeps no other stage from being run."""
    try:
        return stage(args, ends)
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu", metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help=f"({default})")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call (8)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="stages by name")
    parser.add_argument("--seeds", type=int, help="of the paper's runs; default: all")
    parser.add_argument("--toy", action="store_true", help="everything small")
    parser.add_argument("--list", action="store_true", help="the stages, and which are done")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.toy and not args.list:
        parser.error("there is no GPU here; --device cpu needs --toy")
    chosen = {name: stage for name, stage in stages(args) if fnmatch.fnmatch(name, args.only)}
    if not chosen:
        parser.error(f"--only {args.only} is none of the stages; --list says which there are")
    for study in () if args.toy or args.list else STUDIES:
        folder = args.data / study.removeprefix("paper_")
        if any(name.startswith(study) for name in chosen) and not folder.is_dir():
            parser.error(f"--data has no folder {folder}, which {study} needs")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    ends, failed, left = time.monotonic() + 60 * args.minutes, 0, 0
    for name, stage in chosen.items():
        path = args.output / f"{name}.json"
        if args.list:
            print(f"{name:24}{'done' if is_done(path, args) else ''}")
            continue
        if is_done(path, args):
            continue
        if time.monotonic() > ends:
            left += 1
            continue
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        found = attempt(stage, args, ends)
        if found is None:
            left += 1
            continue
        found = {"stage": name, **environment(args), **found}
        found["seconds"] = round(time.monotonic() - started, 1)
        text = json.dumps(found, indent=2) + "\n"
        whole(path, lambda partial, text=text: partial.write_text(text))
        bad = found.get("status", 0) != 0 or not found.get("passed", True)
        failed += bad
        said = f"FAILED, see {path}; without it, it is run again" if bad else "done"
        print(f"{name}: {said}", flush=True)
    if left:
        print(f"{left} stage(s) left: run the same command again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
