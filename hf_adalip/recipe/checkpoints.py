"""Checkpoints that are whole or not there: a manifest with the sha256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SaveError, UsageError
from ..files import MANIFEST, PARTIAL, RESULTS, saving, whole

if TYPE_CHECKING:
    from .folder import RunOptions

_REPLACED = ".replaced.partial"
STAGED = f"results{PARTIAL}"
SAVED = rf"(step|epoch)_[0-9]+({re.escape(PARTIAL)}|{re.escape(_REPLACED)})?"
"""The folders of checkpoints, whole or not, that saving makes in the recipes of images."""


def write_manifest(folder: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Writes down every file of a checkpoint, the last act before it gets its name.

    Args:
        folder: of the checkpoint.
        step: optimizer steps done.
        settings: what a run that resumes from it must have in common with it.
    """
    own = folder / MANIFEST
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != own)
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in found}
    manifest = json.loads(json.dumps({"step": step, "settings": settings, "files": files}))
    text = json.dumps({**manifest, _CHECKSUM: _sha256_of(manifest)}, indent=2)
    whole(own, lambda path: path.write_text(text))


_CHECKSUM = "sha256"
"""In a manifest, of all else in it; those of before 30 November 2026 (0.1.0) have none."""


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
        checksum = found.pop(_CHECKSUM, None)
        if checksum is not None and checksum != _sha256_of(found):
            raise UsageError(f"{path / MANIFEST} is damaged: it is not as it was written")
        return found
    raise UsageError(f"{path / MANIFEST} cannot be read")


def check_contents(path: Path, needed: Sequence[str]) -> None:
    """Reads what is in the files of a checkpoint, before any of it is taken.

    Their checksums only say that they are what was saved, which may not have been whole; and of
    random states that it cannot read, accelerate says nothing. Tensors are mapped, not read.

    Args:
        path: of a checkpoint.
        needed: names of files without which a run does not go on as it would have.

    Raises:
        UsageError: naming the file that is missing or damaged.
    """
    for name in needed:
        if not (path / name).is_file():
            raise UsageError(f"{path} is no whole checkpoint: {path / name} is missing")
    for file in sorted(path.iterdir()):
        try:
            if (file / ".metadata").exists():
                _check_distributed(file)
            elif file.name != "training_args.bin":  # which Trainer does not read
                _check_content(file)
        except UsageError:
            raise
        except Exception as error:  # unpickling raises anything
            raise UsageError(f"{file} is damaged: it cannot be loaded") from error


def _check_distributed(folder: Path) -> None:
    try:
        check_distributed(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_content(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt"):
            pass
    elif file.suffix in (".bin", ".pt", ".pth", ".pkl"):
        from accelerate.utils.other import load

        try:
            found = load(str(file), map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
                raise UsageError(f"{file} has more in it than tensors and numbers") from error
            raise
        if re.match(r"random_states_|rng_state", file.name):
            _check_random_states(found)


def _check_random_states(found: Mapping[str, Any]) -> None:
    """Sets generators of their own to states that accelerate or Trainer saved."""
    import numpy as np
    import torch

    for accelerates, trainers, set_state in (
        ("random_state", "python", random.Random().setstate),
        ("numpy_random_seed", "numpy", np.random.RandomState().set_state),
        ("torch_manual_seed", "cpu", torch.Generator().set_state),
    ):
        set_state(found[accelerates] if accelerates in found else found[trainers])


def find_checkpoint(args: RunOptions, folder: Path) -> tuple[Path, dict[str, Any]] | None:
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
    """The folders of checkpoints, whole or not, or links to some."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(SAVED, path.name) and path.is_dir())


def check_distributed(folder: str | os.PathLike[str]) -> None:
    """Finds what is missing of a checkpoint of torch.distributed.checkpoint, and loads nothing.

    Call it before `torch.distributed.checkpoint.load`, which writes into the tensors that it is
    given as it reads, so that at a file that ends too early the run is half of this and half of
    the checkpoint; or load into a copy. Sizes are compared, not contents.

    Args:
        folder: with the `.metadata` that torch wrote. That is a pickle, and torch runs what is in
            it; here only the classes that torch writes are made, and any other is refused.

    Raises:
        ValueError: naming the file that is missing, shorter than it was, or cannot be read, or has
            another class in it.
    """
    folder = Path(folder)
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            stored = [
                (folder / piece.relative_path, piece.offset + piece.length)
                for piece in _MetadataUnpickler(file).load().storage_data.values()
            ]
    except _ForeignClass as error:
        raise ValueError(
            f"{path} has {error} in it, which torch.distributed.checkpoint does not write and "
            "loading it may run; load another checkpoint"
        ) from error
    except Exception as error:  # pickle raises anything
        raise ValueError(f"{path} is missing or cannot be read") from error
    for path, needed in stored:
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < needed:
            found = "is missing" if size is None else f"is torn: {size} of at least {needed} bytes"
            raise ValueError(f"{path} {found}; load another checkpoint")


_OF_METADATA = {
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # Python 3.13
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}


class _ForeignClass(Exception):  # noqa: N818 (not raised further)
    pass


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what torch.distributed.checkpoint writes into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if name in _OF_METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _ForeignClass(f"{module}.{name}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files get their places in `folder` when all of them are written.

    Raises:
        SaveError: if there is no room; what was there is as it was then.
    """
    partial = folder / STAGED
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with saving(folder):
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda file: file.name == RESULTS):  # they are the last
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).replace(folder / file)
    except SaveError as error:  # of the place that the user knows
        raise SaveError(str(error).replace(str(partial), str(folder))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
