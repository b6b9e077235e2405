"""What a run is to its user, whichever loop trains: how it is stopped, and what it writes down."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from ..errors import UsageError
from ..files import MANIFEST, PARTIAL, RESULTS, whole
from ..monitor import RATES, LayerRateHistory
from ..publish import hub

VERSIONS = (
    *("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy", "pillow"),
    *("pyyaml", "scikit-learn", "scipy", "tensorboard", "timm", "tqdm", "transformers"),
)
"""What the results say the versions of, besides torch, Python and this package."""

INTERRUPTED = 130  # exit status, as the shell's


class Stoppable(Protocol):
    """What ends after the step in which it is asked to."""

    stop_asked: bool


@contextmanager
def asked_to_stop(run: Stoppable) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM (of torchrun, of a queue) wait for the end of the step; a second
    one does not wait."""

    def ask(number: int, frame: FrameType | None) -> None:
        run.stop_asked = True
        for key, handler in before.items():
            signal.signal(key, handler)

    before = {key: signal.getsignal(key) for key in (signal.SIGINT, signal.SIGTERM)}
    for key in before:
        signal.signal(key, ask)
    try:
        yield
    finally:
        for key, handler in before.items():
            signal.signal(key, handler)


def any_asked_to_stop(run: Stoppable, accelerator: Any) -> bool:
    """Whether any process was asked: what is asked of one must be done by all at the same step."""
    if accelerator.num_processes == 1:
        return run.stop_asked
    asked = torch.tensor(float(run.stop_asked), device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum").item())


class Run(Protocol):
    """The options of a run that both loops have."""

    push_to_hub: bool
    hub_model_id: str | None
    resume_from_checkpoint: str | None
    overwrite_output_dir: bool


def check_publishing(args: Run) -> None:
    """Raises UsageError when a run starts for what would be wrong when it is published."""
    if args.push_to_hub:
        try:
            hub.check_run(str(args.hub_model_id))
        except hub.PublishError as error:
            raise UsageError(f"--push_to_hub: {error}") from error


def default_folder(name: str, args: Run) -> Path:
    """Where a run without an --output_dir writes: a folder of its own, outputs/NAME-DATE-TIME.

    With `--resume_from_checkpoint latest` it is the newest of those that are there, if any is.

    Args:
        name: of recipe and optimizer.
        args: of the run.

    Raises:
        UsageError: for an --overwrite_output_dir, which has nothing to overwrite.
    """
    if args.overwrite_output_dir:
        raise UsageError(
            "--overwrite_output_dir needs --output_dir: without one, a run has a fresh folder"
        )
    if args.resume_from_checkpoint == "latest":
        pattern = re.compile(rf"{re.escape(name)}-([0-9]{{8}}-[0-9]{{6}}(-[0-9]+)*)")
        found = [(pattern.fullmatch(path.name), path) for path in Path("outputs").glob("*")]
        ages = [([int(x) for x in match[1].split("-")], path) for match, path in found if match]
        if ages:
            return max(ages)[1]
    folder = Path("outputs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return next(path for path in _numbered(folder) if not os.path.lexists(path))


def _numbered(folder: Path) -> Iterator[Path]:
    """The folder, and the names that it gets if another run has it."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def check_folder(folder: Path, own_files: Callable[[Path], Sequence[Path]], args: Run) -> None:
    """Raises UsageError if a run cannot write in the folder, or would replace what is there and
    nobody said what to do: that is not what `latest` asks for where there is no checkpoint.

    Args:
        folder: to be made, or there already.
        own_files: those of a folder that a run writes.
        args: of the run.
    """
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
        if not stat.S_ISDIR(nearest.stat().st_mode):
            raise UsageError(f"--output_dir {folder}: {nearest} is a file; choose another")
        with tempfile.TemporaryDirectory(dir=nearest):  # root may write anywhere but in /proc
            files = own_files(folder)
    except OSError as error:  # a name too long, a link to nowhere
        raise _no_folder(folder, error) from error
    saved = any((path / MANIFEST).exists() for path in files)
    if files and not args.overwrite_output_dir and not _goes_on_in(folder, args):
        ways = ["choose another --output_dir"]
        if not args.resume_from_checkpoint:  # which excludes the next one
            ways.append("--overwrite_output_dir")
        if saved:
            ways.append("--resume_from_checkpoint latest")
        raise UsageError(f"{folder} has results already ({files[0].name}): {', or '.join(ways)}")
    others = [path.name for path in files if not _of_first_save(path)]
    if args.resume_from_checkpoint == "latest" and others and not saved:
        raise UsageError(
            f"--resume_from_checkpoint latest: nothing to resume in {folder}: there is no "
            f"checkpoint, and a run would replace {', '.join(others)}; choose another --output_dir"
        )


def _goes_on_in(folder: Path, args: Run) -> bool:
    """Whether what is in the folder is of the run that is resumed."""
    checkpoint = args.resume_from_checkpoint
    if not checkpoint or checkpoint == "latest":
        return bool(checkpoint)
    return folder.resolve() in Path(checkpoint).resolve().parents


def _of_first_save(path: Path) -> bool:
    """Whether it is all that a run leaves that was killed before it had a checkpoint (Trainer's
    has its name from the start)."""
    return path.is_dir() and (path.suffix == PARTIAL or path.name.startswith("checkpoint-"))


def make_folder(folder: Path, fresh: bool = False) -> Path:
    """Makes the folder that `check_folder` has seen, and returns it.

    Args:
        folder: of the run.
        fresh: no other run may have it. If one that started in the same second was faster, this
            one gets a number behind its name.

    Raises:
        UsageError: if it cannot be made any more.
    """
    names = _numbered(folder)
    while True:
        path = next(names)
        try:
            path.mkdir(parents=True, exist_ok=not fresh)
            return path
        except OSError as error:
            if not (fresh and isinstance(error, FileExistsError)):
                raise _no_folder(path, error) from error


def _no_folder(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--output_dir {path} cannot be made: {error.strerror}; choose another")


def check_same_run(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UsageError, naming them, if a checkpoint's settings are others than the run's."""
    changed = [
        f"{name} was {saved.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if changed:
        raise UsageError(f"{path} is of a different run: {'; '.join(changed)}")


def load_rates(checkpoint: Path) -> LayerRateHistory:
    """The layers' learning rates up to a checkpoint; raises UsageError if they are damaged."""
    try:
        return LayerRateHistory.load(checkpoint / f"{RATES}.json")
    except ValueError as error:
        raise UsageError(f"{error}: it is damaged; resume from another checkpoint") from error


NOT_SAVED = (
    "checkpoints and results of before are as they were: make room, and run the same command with "
    "--resume_from_checkpoint latest"
)
"""What is said after a SaveError."""


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes a run's results, whole or not at all."""
    text = json.dumps(_finite(dict(results)), indent=2, allow_nan=False)
    whole(folder / RESULTS, lambda path: path.write_text(text + "\n"))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a diverged run has null there."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_name(device: torch.device) -> str:
    """The name of a GPU; of anything else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
