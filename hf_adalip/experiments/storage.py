"""Who runs which cell: an Optuna study that any number of workers share.

A cell is enqueued when it is its turn, and `ask` gives a waiting trial to one worker only. Two
workers may enqueue the same cell at the same moment: then the trial of the lower number is the one
that counts, and whoever is given the other drops it. Optuna's GridSampler is not used: it may give
one cell to two workers, and it does not wait for the cells that another one depends on.

A worker says now and then that it is alive (Optuna has heartbeats for databases only). A trial
whose worker is gone is failed by the next one that looks, and so its cell is to be run again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .study import Cell, Study

try:
    import optuna
    from optuna.exceptions import OptunaError, StorageInternalError
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import (
        JournalFileBackend,
        JournalFileOpenLock,
        JournalRedisBackend,
    )
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise ImportError(
        "hf_adalip.experiments needs optuna: pip install 'hf-adalip[experiments]'"
    ) from error

BEAT = 30.0
"""Seconds between two signs of life of a trial."""

GRACE = 300.0
"""Seconds without one after which a trial's worker is taken for dead, if one cannot see it."""

CELL, OWNER, ALIVE, ROW = "cell", "owner", "alive", "row"
"""What a trial has among its user attributes."""

_SCHEDULE = "schedule "

_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


class Storage:
    """The trials of a study.

    Args:
        study: what is run.
        where: a URL of Optuna's, or the path of a journal file.

    Raises:
        UsageError: if it cannot be used, or has been begun with another script or arguments.
    """

    def __init__(self, study: Study, where: str | Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.cells = {cell.key: cell for cell in study.cells()}
        with _readable(where):
            self.optuna = optuna.create_study(
                study_name=study.full_name,
                storage=_open(where),
                sampler=optuna.samplers.RandomSampler(),  # that is never asked
                direction=study.direction,
                load_if_exists=True,
            )
            self._same_runs(study)
        self._seen: dict[int, tuple[Any, float]] = {}
        self._retried: set[int] = set()

    def _same_runs(self, study: Study) -> None:
        """The first to come says what is run; to add seeds, learning rates, optimizers or schedules
        is fine.

        Values that are paths may be others on another machine.
        """
        schedules = {
            f"{_SCHEDULE}{name}": {key: _last(value) for key, value in arguments.items()}
            for name, arguments in study.schedules.items()
        }
        mine: dict[str, Any] = {
            "script": study.script,
            "metric": study.metric,
            "direction": study.direction,
            "optimizer option": study.optimizer_option,
            **{key: _last(value) for key, value in study.arguments.items()},
            "further arguments": [_last(word) for word in study.rest],
            **schedules,
        }
        mine = json.loads(json.dumps(mine))
        begun = self.optuna.user_attrs.get("settings", mine)
        for key in begun | mine:
            in_both = key in begun and key in mine
            if (in_both or not key.startswith(_SCHEDULE)) and begun.get(key) != mine.get(key):
                raise UsageError(
                    f"study {study.full_name} was begun with {key} {begun.get(key)!r}, and is now "
                    f"to have {mine.get(key)!r}; choose another --output_dir (or --storage)"
                )
        if self.optuna.user_attrs.get("settings") != mine | begun:
            self.optuna.set_user_attr("settings", mine | begun)

    def extras(self, asked: Collection[str]) -> list[str]:
        """All extras that anyone has asked for, these too: one that was begun is gone on with."""
        known = list(self.optuna.user_attrs.get("extras", []))
        found = [*known, *(extra for extra in asked if extra not in known)]
        if found != known:
            self.optuna.set_user_attr("extras", found)
        return found

    def _trials(self) -> dict[str, list[FrozenTrial]]:
        """By cell, those that count, in their order."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self.optuna.get_trials(deepcopy=False):
            counts = trial.state in _LIVE or ROW in trial.user_attrs
            if counts and trial.number not in self._retried and CELL in trial.user_attrs:
                found.setdefault(trial.user_attrs[CELL], []).append(trial)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What the runs came to, one row of results.jsonl for each cell: that of its last run."""
        found: dict[str, dict[str, Any]] = {}
        for trial in self.optuna.get_trials(deepcopy=False):
            if trial.state.is_finished() and ROW in trial.user_attrs:
                found[trial.user_attrs[CELL]] = trial.user_attrs[ROW]
        return list(found.values())

    def finished(self) -> dict[str, dict[str, Any]]:
        """Of the cells that are not to be run any more, their rows."""
        return {
            key: trials[-1].user_attrs[ROW]
            for key, trials in self._trials().items()
            if key in self.cells and all(trial.state.is_finished() for trial in trials)
        }

    def running(self) -> int:
        """How many trials are."""
        return sum(
            trial.state == TrialState.RUNNING and ALIVE in trial.user_attrs
            for trials in self._trials().values()
            for trial in trials
        )

    def run_again(self, key: str) -> None:
        """Lets a cell that is finished be run again."""
        self._retried.update(trial.number for trial in self._trials().get(key, []))

    def retry_failed(self) -> int:
        """Lets the cells that have failed until now be run again; returns how many there are."""
        failed = [
            trial.number
            for trials in self._trials().values()
            for trial in trials
            if trial.state == TrialState.FAIL
        ]
        self._retried.update(failed)
        return len(failed)

    def claim(self, ready: Sequence[Cell]) -> tuple[Trial, Cell] | None:
        """A trial for one of these cells that nobody has run, or None if none of them is left."""
        while True:
            taken = self._trials()
            waiting = [t for ts in taken.values() for t in ts if t.state == TrialState.WAITING]
            free = next((cell for cell in ready if cell.key not in taken), None)
            if free is None and not waiting:
                return None
            if free is not None and not waiting:
                params = {"learning_rate": free.learning_rate, "seed": free.seed}
                attributes = {CELL: free.key, "optimizer": free.optimizer, "role": free.role}
                self.optuna.enqueue_trial(params, attributes)
            trial = self.optuna.ask()
            key = trial.user_attrs.get(CELL)
            if key in self.cells and self._counts(trial.number, key):
                trial.set_user_attr(OWNER, _this_process())
                trial.set_user_attr(ALIVE, 0)
                trial.suggest_float("learning_rate", 1e-12, 1e12, log=True)  # for dashboards
                trial.suggest_int("seed", 0, 2**32 - 1)
                return trial, self.cells[key]
            self.drop(trial)

    def _counts(self, number: int, key: str) -> bool:
        """Whether no other trial of the cell was there before."""
        return min(trial.number for trial in self._trials()[key]) == number

    def drop(self, trial: Trial | int) -> None:
        """Ends a trial that came to nothing; its cell is free again, unless another has it."""
        _unless_ended(lambda: self.optuna.tell(trial, state=TrialState.FAIL))

    def alive(self, trial: Trial, beats: int) -> bool:
        """Says that a trial is being run; False if it was taken for dead, and is void."""
        return _unless_ended(lambda: trial.set_user_attr(ALIVE, beats))

    def finish(self, trial: Trial, row: Mapping[str, Any], value: float | None) -> bool:
        """Writes down what a trial came to; False if it was taken for dead, and is void."""
        worst = float("inf" if self.optuna.direction.name == "MINIMIZE" else "-inf")
        failed = row["state"] == "failed"
        end = (
            {"state": TrialState.FAIL} if failed else {"values": worst if value is None else value}
        )
        return _unless_ended(
            lambda: trial.set_user_attr(ROW, dict(row)), lambda: self.optuna.tell(trial, **end)
        )

    def free_dead(self) -> int:
        """Fails the trials whose workers are gone; returns how many."""
        dead = [
            trial.number
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if self._is_dead(trial)
        ]
        for number in dead:
            self.drop(number)
        return len(dead)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get(OWNER, {})
        here = _this_process()
        if owner.get("machine") == here["machine"] and not _exists(owner["pid"]):
            return True
        # by this machine's clock alone: those of others may go wrong
        beats, known = trial.user_attrs.get(ALIVE), self._seen.get(trial.number)
        if known is None or known[0] != beats:
            self._seen[trial.number] = beats, time.monotonic()
            return False
        return time.monotonic() - known[1] > GRACE


def _last(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _this_process() -> dict[str, Any]:
    try:  # containers may have the same name, and numbers of processes of their own
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {"machine": f"{platform.node()} {space}".strip(), "pid": os.getpid()}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _unless_ended(*calls: Callable[[], Any]) -> bool:
    """Makes the calls; False if someone else has ended the trial that they are for."""
    try:
        for call in calls:
            call()
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    except ValueError as error:
        if "Cannot tell" not in str(error):
            raise
        return False
    return True


def _open(where: str | Path) -> Any:
    text = str(where)
    if text.startswith(("redis://", "rediss://")):
        return JournalStorage(JournalRedisBackend(text))
    if "://" in text:
        return RDBStorage(text)
    path = Path(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        cut_half_line(path)
    # Optuna's usual lock is a link to a path that, being relative, is not found when it is stale
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes to a file that is written to in lines; half a minute is waited for a lock
    whose holder was killed."""
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cut_half_line(path: Path) -> None:
    """Removes the end of a file that a process was killed while writing."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


@contextmanager
def usable(where: str | Path) -> Iterator[None]:
    """Makes a UsageError of what a storage raises that is not there, is full or stays locked."""
    name = where if isinstance(where, Path) else "--storage"
    try:
        yield
    except Exception as error:
        of_storage = isinstance(error, (OptunaError, StorageInternalError))
        library = type(error).__module__.partition(".")[0]
        if not of_storage and library not in ("sqlalchemy", "redis", "sqlite3"):
            raise
        cause = error.__cause__ or error  # Optuna says that there was one, the database which
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UsageError(f"{name} cannot be used: {reason[0]}") from error


@contextmanager
def _readable(where: str | Path) -> Iterator[None]:
    """The same, and of what is raised when it is opened and has something else in it."""
    name = where if isinstance(where, Path) else "--storage"
    try:
        with usable(where):
            yield
    except UsageError:
        raise
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{name} is damaged, and cannot be read ({type(error).__name__}: {error}); move it "
            "away, or choose another --output_dir"
        ) from error
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{name} cannot be used: {reason[0]}") from error
