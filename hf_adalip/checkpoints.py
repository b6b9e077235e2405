"""Checkpoints that are whole or not there: a manifest with the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import TrainingArguments

MANIFEST, RESULTS = "checkpoint.json", "all_results.json"
PARTIAL, _REPLACED = ".partial", ".replaced.partial"
_SAVED = re.compile(rf"(step|epoch)_[0-9]+({re.escape(PARTIAL)}|{re.escape(_REPLACED)})?")


class UsageError(ValueError):
    """What is wrong with the arguments, in one line for the user."""


def write_manifest(folder: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Writes down every file of a checkpoint, the last act before it gets its name.

    Args:
        folder: of the checkpoint.
        step: optimizer steps done.
        settings: what a run that resumes from it must have in common with it.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in found}
    manifest = {"step": step, "settings": settings, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there as they were written.

    Raises:
        UsageError: saying what is wrong.
    """
    try:
        manifest = _read_manifest(path)
        for name, digest in manifest["files"].items():
            if _sha256(path / name) != digest:
                raise UsageError(f"{path / name} is damaged")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is no whole checkpoint: {error.filename} is missing") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    kinds = {"step": int, "settings": dict, "files": dict}
    try:
        found: Any = json.loads((path / MANIFEST).read_text())
    except ValueError:
        found = None
    if isinstance(found, dict) and all(isinstance(found.get(k), kinds[k]) for k in kinds):
        return found
    raise UsageError(f"{path / MANIFEST} cannot be read")


def find_checkpoint(args: TrainingArguments, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from and its manifest; None to start from the beginning.

    That is if none was asked for, or the latest of a folder without checkpoints and results:
    a run that is restarted by itself (by torchrun, by a queue) has the same arguments each time.
    A run of Trainer that was killed in its first save has left a folder without a manifest, which
    is none either.

    Raises:
        UsageError: if there is no whole one.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise UsageError(f"--resume_from_checkpoint: there is no folder {wanted}")
        return Path(wanted), read_checkpoint(Path(wanted))
    names = ("step_*", "epoch_*", "checkpoint-*")
    paths = [path for name in names for path in folder.glob(name) if path.suffix != PARTIAL]
    steps, unfinished, damaged = {}, [], []
    for path in paths:
        try:
            steps[path] = _read_manifest(path)["step"]
        except FileNotFoundError:
            unfinished.append(f"{path} is no whole checkpoint: {path / MANIFEST} is missing")
        except UsageError as error:
            damaged.append(str(error))
    chosen = None
    for path in sorted(steps, key=steps.__getitem__, reverse=True):  # to hash no more than needed
        try:
            chosen = path, read_checkpoint(path)
            break
        except UsageError as error:
            damaged.append(str(error))
    if chosen is None and (damaged or (folder / RESULTS).exists()):
        why = "; ".join(damaged + unfinished) or "there is no checkpoint"
        raise UsageError(f"--resume_from_checkpoint latest: nothing to resume in {folder}: {why}")
    how = f"going on from {chosen[0]}" if chosen else "starting from the beginning"
    for problem in damaged + unfinished:
        print(f"warning: {problem}; {how}", file=sys.stderr)
    return chosen


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a checkpoint that is whole its name.

    One that has the name is replaced by two renames; `finish_replacing` is for what was
    interrupted between them.
    """
    replaced = path.with_name(f"{path.name}{_REPLACED}")
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Gives a whole checkpoint its name, if it was being replaced and neither it nor the new one
    has the name; for all processes at a time."""
    for partial in saved_in(folder):  # the new one before the replaced one, by name
        if partial.name.endswith(PARTIAL):
            path = partial.with_name(partial.name.removesuffix(_REPLACED).removesuffix(PARTIAL))
            with suppress(UsageError, OSError):  # not whole, or another process was faster
                if not path.exists():
                    read_checkpoint(partial)
                    partial.rename(path)


def saved_in(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, or links to some, that saving makes."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _SAVED.fullmatch(path.name) and path.is_dir())


def check_distributed(folder: str | os.PathLike[str]) -> None:
    """Finds what is missing of a checkpoint of torch.distributed.checkpoint, and loads nothing.

    Call it before `torch.distributed.checkpoint.load`, which writes into the tensors that it is
    given as it reads, so that at a file that ends too early the run is half of this and half of
    the checkpoint; or load into a copy. Sizes are compared, not contents.

    Args:
        folder: with the `.metadata` that torch wrote; read with pickle, as torch reads it.

    Raises:
        ValueError: naming the file that is missing, shorter than it was, or cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    folder = Path(folder)
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # pickle raises anything
        raise ValueError(f"{folder / '.metadata'} is missing or cannot be read") from error
    for piece in stored:
        path, needed = folder / piece.relative_path, piece.offset + piece.length
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < needed:
            found = "is missing" if size is None else f"is torn: {size} of at least {needed} bytes"
            raise ValueError(f"{path} {found}; load another checkpoint")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, and renames what it wrote to `path`."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    write(partial)
    partial.replace(path)
