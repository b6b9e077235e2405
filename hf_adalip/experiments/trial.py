"""One run of a cell: a process, and what it came to as a row of results.jsonl."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Literal

from ..files import RESULTS
from ..monitor import RATES
from . import guard
from .study import Cell, Study, is_number

LOG = "log.txt"
_LINES = 5  # of the log of a failed run that are written down


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was ended before it was finished."""


def run(
    command: Sequence[str], folder: Path, threads: int, stop: Event, wanted: Callable[[], bool]
) -> tuple[int, float]:
    """Runs a command with its output in `log.txt` of an empty folder.

    Args:
        command: to run.
        folder: of the run; what is in it is removed.
        threads: of OpenMP.
        stop: set to end it.
        wanted: called again and again while it runs, and asked whether it is to go on.

    Returns:
        the exit status, and how many seconds it took.

    Raises:
        Stopped: if it was stopped.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(guard.__file__), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            start_new_session=True,  # Ctrl-C is the sweep's, which stops its runs itself
        )
        assert process.stdin is not None
        try:
            while True:
                try:
                    return process.wait(0.5), time.monotonic() - started
                except subprocess.TimeoutExpired:
                    if stop.is_set() or not wanted():
                        raise Stopped from None
        finally:
            process.stdin.close()
            process.wait()


def row_of(
    study: Study,
    cell: Cell,
    *,
    state: Literal["complete", "failed"],
    error: str | None,
    seconds: float,
    command: str,
    median_scale: float | None,
    results: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A line of results.jsonl: which run it was, and what it came to."""
    return {
        "study": study.name,
        "scale": study.scale,
        "schedule": cell.schedule,
        "optimizer": cell.optimizer,
        "role": cell.role,
        "pair": cell.pair,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "state": state,
        "error": error,
        "seconds": seconds,
        "command": command,
        "median_scale": median_scale,
        "results": results,
    }


def outcome(study: Study, folder: Path, status: int) -> dict[str, Any]:
    """What a run came to: `state`, `error`, `median_scale` and `results` of its row.

    A run whose loss was not finite ends with an error and with results that say that it is
    finished: it is complete.
    """
    results, error = _results(folder, study.metric)
    complete = error is None and (not status or (results or {}).get("finished") is True)
    return {
        "state": "complete" if complete else "failed",
        "error": _failure(status, folder) if status else error,
        "median_scale": median_scale(folder),
        "results": results,
    }


def _results(folder: Path, metric: str) -> tuple[dict[str, Any] | None, str | None]:
    """What a run wrote, and what is wrong with it."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None, f"the script wrote no {RESULTS} into --output_dir"
    except (OSError, ValueError) as error:
        return None, f"{RESULTS} cannot be read: {error}"
    if not isinstance(found, dict):
        return None, f"{RESULTS} must have keys and values"
    if metric not in found:
        numbers = [key for key, value in found.items() if isinstance(value, (int, float))]
        return found, f"{RESULTS} has no {metric}; its numbers are {', '.join(numbers) or 'none'}"
    return found, None


def _failure(status: int, folder: Path) -> str:
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    last = [line for line in lines if line][-_LINES:]
    return "\n".join([f"exit status {status}", *last])


def median_scale(folder: Path) -> float | None:
    """The median of S over the layers and steps that a run recorded; None if it has no S."""
    try:
        recorded = json.loads((folder / f"{RATES}.json").read_text(encoding="utf-8"))["scale"]
        scales = [s for layer in recorded.values() for s in layer if s is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    finite = [scale for scale in scales if math.isfinite(scale)]
    return statistics.median(finite) if finite else None


def metric_of(row: Mapping[str, Any], metric: str) -> float | None:
    """A row's number, None if it has none that is finite."""
    value = (row.get("results") or {}).get(metric)
    return float(value) if value is not None and is_number(value) else None


def tidy(folder: Path, patterns: Sequence[str]) -> None:
    """Removes from a run's folder what nobody needs."""
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def without_places(value: Any, words: Sequence[str] = ()) -> Any:
    """Without this machine's folders, in all strings: they are nobody's business elsewhere.

    What is here gets a relative path, another absolute path among the words its last part.
    """
    here = f"{Path.cwd()}{os.sep}"
    packages = {sysconfig.get_path(key) + os.sep for key in ("purelib", "platlib", "stdlib")}
    others = {part for word in words for part in re.findall(r"(?:^|=)(/[^=,]+)", word)}
    places = {here: "", here[:-1]: ".", sys.executable: "python", **dict.fromkeys(packages, "")}
    places |= {place: Path(place).name for place in others if not place.startswith(here)}
    if (home := f"{Path.home()}{os.sep}") != os.sep * 2:
        places[home] = f"~{os.sep}"

    ends = {place: "" if place.endswith(os.sep) else r"(?![\w-])" for place in places}
    longest_first = sorted(places, key=len, reverse=True)
    pattern = re.compile(
        r"(?<![\w.~-])(?:"
        + "|".join(re.escape(place) + ends[place] for place in longest_first)
        + ")"
    )

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {replaced(key): replaced(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [replaced(item) for item in value]
        if isinstance(value, str):
            return pattern.sub(lambda match: places[match[0]], value)
        return value

    return replaced(value)


def shown(command: Sequence[str]) -> str:
    """A command, as one would type it."""
    return shlex.join(["python", *command[1:]])
