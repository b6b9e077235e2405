"""The folder of a run: which one, what in it is the run's, and whether it may be written to."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import UsageError
from ..files import MANIFEST, PARTIAL, RESULTS
from ..monitor import PROBES, RATES
from ..publish.script import SCRIPT


class RunOptions(Protocol):
    """The options of a run that both loops have."""

    push_to_hub: bool
    hub_model_id: str | None
    resume_from_checkpoint: str | None
    overwrite_output_dir: bool


@dataclass(frozen=True)
class OwnFiles:
    """What runs leave in their folder; what else is there is the user's.

    Args:
        files: regular expression of the names of files besides those that every run leaves.
        checkpoints: the same, of the folders of checkpoints.
    """

    files: str
    checkpoints: str

    def __call__(self, folder: Path) -> list[Path]:
        """Those in a folder, whether it exists or not, by name."""
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        tables = rf"({RATES}|{PROBES})\.(json|png)"
        files = rf"{re.escape(RESULTS)}|{tables}|{re.escape(SCRIPT)}|{self.files}"
        return [
            path
            for path in found
            if (re.fullmatch(files, path.name) and path.is_file())
            or (re.fullmatch(self.checkpoints, path.name) and path.is_dir())
        ]

    def clear(self, folder: Path, overwrite: bool, unfinished: Callable[[Path], bool]) -> None:
        """Removes what a run replaces.

        Args:
            folder: of the run.
            overwrite: all of it was asked for.
            unfinished: whether a checkpoint is one whose saving was cut off; they go in any case.
        """
        for path in self(folder):
            # the script may be what is running; it is replaced at the end
            if unfinished(path) or (overwrite and path.name != SCRIPT):
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def default_folder(name: str, args: RunOptions) -> Path:
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


def check_folder(folder: Path, own_files: OwnFiles, args: RunOptions) -> None:
    """Raises UsageError if a run cannot write in the folder, or would replace what is there and
    nobody said what to do: that is not what `latest` asks for where there is no checkpoint.

    Args:
        folder: to be made, or there already.
        own_files: what a run leaves there.
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


def _goes_on_in(folder: Path, args: RunOptions) -> bool:
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
