"""What a run calls its files, and how a file is written: whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import SaveError

MANIFEST, RESULTS = "checkpoint.json", "all_results.json"
PARTIAL = ".partial"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Makes a SaveError of what a full disk, a quota or `ulimit -f` raises in it.

    Args:
        path: what could not be written then, unless the error says it.
    """
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found is not None:
            if reason := _no_room(found):
                name = getattr(found, "filename", None) or path
                raise SaveError(f"{name} could not be written: {reason}") from error
            found = found.__cause__ or found.__context__
        raise


def _no_room(error: BaseException) -> str | None:
    """Why there was no room, if that is what the error is of."""
    number = error.errno if isinstance(error, OSError) else None
    if said := re.search(r"os error (\d+)", str(error)):  # of safetensors, which is no OSError
        number = int(said[1])
    if number in _NO_ROOM:
        return os.strerror(number) + (" for ulimit -f" if number == errno.EFBIG else "")
    if isinstance(error, RuntimeError) and re.search(
        r"enforce fail at inline_container|PytorchStreamWriter failed writing|iostream error",
        str(error),
    ):  # torch does not say why
        return "no space left on device, or file too large for ulimit -f"
    return None


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, and renames what it wrote to `path`.

    Raises:
        SaveError: if there is no room; what was there is as it was then.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with saving(path):
            write(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
