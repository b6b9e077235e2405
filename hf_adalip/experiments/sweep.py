"""A sweep: all runs of a study, by workers here and elsewhere, until none is left."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import UsageError
from ..files import whole
from . import storage as trials
from . import trial as runs
from .study import ROWS, RUNS, STUDY, Cell, Study, command_words

JOURNAL = "journal.log"

LOOK_AGAIN = 2.0
"""Seconds until a worker without a cell looks whether there is one, or whether all are finished."""

LATEST = 20
"""So many runs say how long the next ones take: the machine may have had other work before."""


@dataclass(frozen=True)
class Place:
    """Where a sweep writes, where it keeps its trials and finds recipes, and how many run here."""

    output_dir: Path
    storage: str | None = None
    recipes: Path = Path("recipes")
    workers: int = 1


def sweep(
    study: Study,
    place: Place,
    with_extras: Callable[[Sequence[str]], Study],
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Runs what is left of a study.

    Args:
        study: what is run.
        place: where.
        with_extras: the same study with other extras, for those that were asked for earlier.
        retry_failed: whether runs that failed are run again.
        say: called with each line for the user.

    Returns:
        how many cells are complete, failed and left.

    Raises:
        UsageError: if the script or the storage cannot be used. Nothing has been run then.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, when the runs have been told to end.
    """
    words = command_words(study.script, place.recipes)
    where = place.storage or place.output_dir / JOURNAL
    found = trials.Storage(study, where)
    with trials.usable(where), ended_by_signals():
        if (extras := found.extras(study.extras)) != list(study.extras):
            study = with_extras(extras)
            found = trials.Storage(study, where)
        writer = Writer(study, place, found)
        writer.begin()
        progress = Progress(study, found, place.workers, say)
        progress.begin(found.retry_failed() if retry_failed else 0, found.free_dead())
        Workers(study, place, words, found, writer, progress).run()
        writer.rewrite()
        return progress.end()


class Workers:
    """Threads that each run one cell at a time, in a process of its own."""

    def __init__(
        self,
        study: Study,
        place: Place,
        words: list[str],
        found: trials.Storage,
        writer: Writer,
        progress: Progress,
    ) -> None:
        self.study, self.place, self.words = study, place, words
        self.found, self.writer, self.progress = found, writer, progress
        self.stop, self.errors = threading.Event(), list[BaseException]()
        self.threads = max(1, _cores() // place.workers)

    def run(self) -> None:
        """Until all cells are finished, wherever they are run."""
        threads = [threading.Thread(target=self._work) for _ in range(self.place.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # so that a signal is seen
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        if self.errors:
            raise self.errors[0]

    def _work(self) -> None:
        try:
            while not self.stop.is_set():
                self.found.free_dead()
                claimed = self.found.claim(self._ready())
                if claimed is not None:
                    self._run(*claimed)
                elif len(self.found.finished()) == len(self.found.cells):
                    return
                else:
                    self.stop.wait(LOOK_AGAIN)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _ready(self) -> list[Cell]:
        """The cells that can be run: controls when all runs of their form are finished.

        A control that is finished is run again if the median of S is another one by now, because
        seeds were added or failed runs of the form were made again.
        """
        rows = self.found.finished()
        ready = []
        for cell in self.found.cells.values():
            if cell.role == "control":
                if not all(form.key in rows for form in self.study.forms_of(cell)):
                    continue
                if cell.key in rows and rows[cell.key]["median_scale"] != self._scale(cell, rows):
                    self.found.run_again(cell.key)
            ready.append(cell)
        return ready

    def _scale(self, control: Cell, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The median over the seeds of the median of S in the form's runs."""
        forms = [rows[form.key] for form in self.study.forms_of(control) if form.key in rows]
        known = [row["median_scale"] for row in forms if row["median_scale"] is not None]
        return statistics.median(known) if known else None

    def _run(self, trial: Any, cell: Cell) -> None:
        folder = self.place.output_dir / RUNS / cell.key
        scale = self._scale(cell, self.found.finished()) if cell.role == "control" else None
        options = self.study.options(cell, cell.learning_rate * (scale or 1.0), str(folder))
        command = [sys.executable, *self.words, *options]
        seconds, beats, said = 0.0, 0, time.monotonic()

        def wanted() -> bool:
            nonlocal beats, said
            if time.monotonic() - said < trials.BEAT:
                return True
            beats, said = beats + 1, time.monotonic()
            return self.found.alive(trial, beats)

        if cell.role == "control" and scale is None:
            error = f"no run of {cell.pair} at this learning rate has an S to take the median of"
            found: dict[str, Any] = {
                "state": "failed",
                "error": error,
                "median_scale": None,
                "results": None,
            }
        else:
            try:
                status, seconds = runs.run(command, folder, self.threads, self.stop, wanted)
            except runs.Stopped:
                return self.found.drop(trial)
            found = runs.outcome(self.study, folder, status)
            runs.tidy(folder, self.study.discard)
        row = runs.row_of(
            self.study,
            cell,
            state=found["state"],
            error=found["error"],
            seconds=round(seconds, 3),
            command=runs.shown(command),
            median_scale=scale if cell.role == "control" else found["median_scale"],
            results=found["results"],
        )
        row = runs.without_places(row, command)
        if self.found.finish(trial, row, runs.metric_of(row, self.study.metric)):
            self.writer.add(row)
            self.progress.add(cell, row)
        return None


class Writer:
    """study.yaml and results.jsonl; other sweeps may write into the same folder."""

    def __init__(self, study: Study, place: Place, found: trials.Storage) -> None:
        self.study, self.folder, self.found = study, place.output_dir, found
        self.path = place.output_dir / ROWS
        self.written: set[str] = set()

    def begin(self) -> None:
        """Writes down what is run, and what there is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [*map(str, self.study.arguments.values()), *self.study.rest]
        text = yaml.safe_dump(
            runs.without_places(self.study.as_run(), words), sort_keys=False, allow_unicode=True
        )
        whole(self.folder / STUDY, lambda path: path.write_text(text, encoding="utf-8"))
        self.rewrite()

    def rewrite(self) -> None:
        """Makes results.jsonl what the storage says: a line for each cell, that of its last run."""
        with trials.locked(self.path):
            rows = self.found.rows()
            text = "".join(map(_line, rows))
            whole(self.path, lambda path: path.write_text(text, encoding="utf-8"))
            self.written = {_identity(row) for row in rows}

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a line; of a cell that has one, the line is replaced."""
        if _identity(row) in self.written:
            return self.rewrite()
        with trials.locked(self.path):
            trials.cut_half_line(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
            self.written.add(_identity(row))
        return None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _identity(row: Mapping[str, Any]) -> str:
    keys = ("role", "pair", "optimizer", "schedule", "learning_rate", "seed")
    return json.dumps([row[key] for key in keys])


class Progress:
    """A line for each finished run: how many are done, how long it goes on, the best so far."""

    def __init__(
        self, study: Study, found: trials.Storage, workers: int, say: Callable[[str], None]
    ) -> None:
        self.study, self.found, self.workers, self.say = study, found, workers, say
        self.lock = threading.Lock()

    def begin(self, again: int, freed: int) -> None:
        """Says what there is to do."""
        total, done = len(self.found.cells), len(self.found.finished())
        notes = (
            [f"{done} of {total} runs are done"] if done or again or freed else [f"{total} runs"]
        )
        notes += [f"{again} that failed are run again"] if again else []
        notes += [f"{freed} whose worker was gone are run again"] if freed else []
        self.say(f"{self.study.full_name}: {'; '.join(notes)}")

    def add(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Says what a run came to."""
        with self.lock:
            rows = self.found.finished()
            total, done = len(self.found.cells), len(rows)
            value = runs.metric_of(row, self.study.metric)
            if row["state"] == "failed":
                outcome = "failed: " + " / ".join(str(row["error"]).splitlines()[-2:])
            else:
                outcome = f"{self.study.metric} {'not finite' if value is None else f'{value:.4g}'}"
            parts = [
                f"[{done:{len(str(total))}}/{total}] {cell}: {outcome} ({row['seconds']:.0f} s)"
            ]
            parts += [f"about {_time(left)} left"] if (left := self._left(rows, total)) else []
            parts += [f"best {best}"] if (best := self._best(rows)) else []
            self.say("; ".join(parts))

    def _left(self, rows: Mapping[str, Mapping[str, Any]], total: int) -> float:
        """Seconds: as long as one of the latest runs for each that is left, as many at a time."""
        seconds = [row["seconds"] for row in rows.values() if row["seconds"]][-LATEST:]
        at_once = max(self.workers, self.found.running() + 1)  # this worker goes on
        return statistics.median(seconds) * (total - len(rows)) / at_once if seconds else 0.0

    def _best(self, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
        known = [
            (value, key)
            for key, row in rows.items()
            if row["state"] == "complete"
            and (value := runs.metric_of(row, self.study.metric)) is not None
        ]
        if not known:
            return None
        better = min if self.study.direction == "minimize" else max
        value, key = better(known)
        return f"{value:.4g} by {self.found.cells[key]}"

    def end(self) -> dict[str, int]:
        """Says and returns how it ended."""
        rows = self.found.finished()
        failed = [key for key, row in rows.items() if row["state"] == "failed"]
        counts = {
            "complete": len(rows) - len(failed),
            "failed": len(failed),
            "left": len(self.found.cells) - len(rows),
        }
        text = f"{self.study.full_name}: {counts['complete']} runs complete"
        if failed:
            error = " / ".join(str(rows[failed[0]]["error"]).splitlines()[-2:])
            text += (
                f", {len(failed)} failed, the first of them {self.found.cells[failed[0]]} "
                f"({error}); --retry_failed runs them again"
            )
        self.say(text)
        return counts


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM be what Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_workers(number: int) -> None:
    """Raises UsageError if there would be none."""
    if number < 1:
        raise UsageError(f"--workers must be at least 1, got {number}")
