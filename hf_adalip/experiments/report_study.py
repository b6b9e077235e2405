"""What a report reads: a study's folder, its trials, and the arms that are compared in it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ..errors import UsageError
from ..registry import LIP_PREFIX, SECANT_PREFIX
from .paper import Benchmark, benchmark_of
from .reading import load_study, shipped
from .study import (
    CONSTANT,
    ROWS,
    STUDY,
    Cell,
    Pair,
    Peer,
    Role,
    as_direction,
    as_rates,
    as_seeds,
    is_number,
    usual_direction,
)

ROLES = get_args(Role)

_NAMES = {
    **{"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSProp", "adamw": "AdamW", "nadam": "NAdam"},
    **{"adalip": "AdaLip", "adamlip": "AdamLip", "rmslip": "RMSLip"},
    **{"adalipu": "AdaLip-U", "adamlipu": "AdamLip-U", "rmslipu": "RMSLip-U"},
    **{"prodigy": "Prodigy", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW"},
    **dict.fromkeys(("adamwschedulefree", "schedule_free_adamw"), "Schedule-free AdamW"),
}
_WRAPPERS = {LIP_PREFIX: "Lipschitz", SECANT_PREFIX: "Secant"}


def shown(optimizer: str) -> str:
    """An optimizer's name as the paper writes it; "Secant(Adam)" for secant-adam."""
    for prefix, wrapper in _WRAPPERS.items():
        if optimizer.startswith(prefix):
            return f"{wrapper}({shown(optimizer.removeprefix(prefix))})"
    return _NAMES.get(optimizer, optimizer)


@dataclass(frozen=True)
class Metric:
    """A number of a run's results. "best_" before a name is the best over its epochs."""

    name: str
    lower: bool = False  # is better

    @property
    def of_epoch(self) -> str:
        """What it is called among the numbers of an epoch."""
        return self.name.removeprefix("best_")

    @property
    def words(self) -> str:
        """As in "peak train accuracy"."""
        words = self.of_epoch.replace("_", " ")
        if self.of_epoch == self.name:
            return words
        return f"{'lowest' if self.lower else 'peak'} {words}"

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return min(values) if self.lower else max(values)


@dataclass(frozen=True)
class Trial:
    """A line of results.jsonl. `learning_rate` of a control is the form's that it answers to."""

    role: Role
    optimizer: str
    pair: str | None
    schedule: str
    learning_rate: float
    seed: int
    state: str
    error: str | None
    seconds: float | None
    command: str
    median_scale: float | None
    results: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the trials of one run have in common. Pairs and peers share those of a base."""
        pair = self.pair if self.role == "control" else None
        return (self.optimizer, pair, self.schedule, self.learning_rate, self.seed)

    @property
    def folder(self) -> str:
        """The name that a sweep gives the folder of its run."""
        of = self.optimizer, self.pair, self.schedule, self.learning_rate, self.seed
        return Cell(self.role, *of).key

    @property
    def outcome(self) -> str:
        """Either complete, diverged (it ran, a loss at its end is not finite) or failed."""
        losses = [self.results[name] for name in _LOSSES if name in self.results]
        if losses and not all(is_number(loss) for loss in losses):
            return "diverged"
        return "complete" if self.state == "complete" else "failed"

    @property
    def epochs(self) -> Sequence[Mapping[str, Any]]:
        """The numbers of each epoch, where the script writes them and did not fail."""
        found = self.results.get("epochs")
        if self.outcome == "failed" or not isinstance(found, list):  # it may be their number
            return ()
        return [entry for entry in found if isinstance(entry, dict)]

    def curve(self, metric: Metric) -> list[tuple[float, float]]:
        """(epoch, value) of the epochs in which the metric is finite."""
        return [
            (float(entry["epoch"]), float(entry[metric.of_epoch]))
            for entry in self.epochs
            if is_number(entry.get(metric.of_epoch)) and is_number(entry.get("epoch"))
        ]

    def value(self, metric: Metric) -> float | None:
        """The metric of the run, None if it failed or has none.

        Of a diverged run without it, it is infinite if it is a loss: as bad as can be.
        """
        if self.outcome == "failed":
            return None
        if metric.name != metric.of_epoch and (curve := self.curve(metric)):
            return metric.best(value for _, value in curve)
        found: Any = self.results.get(metric.name, self.results.get(metric.of_epoch))
        if is_number(found):
            return float(found)
        return math.inf if metric.lower and self.outcome == "diverged" else None


_LOSSES = ("train_loss", "eval_loss", "loss")


@dataclass(frozen=True)
class Arm:
    """Runs of one optimizer in one role with one schedule, at each learning rate and seed."""

    role: str
    optimizer: str
    pair: str | None  # of a control; of a base only where pairs with it have other rates
    learning_rates: tuple[float, ...]
    trials: Mapping[tuple[float, int], Trial]
    also: bool = False  # of a peer: a pair has the optimizer too

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        name = f"{shown(self.optimizer)}{' as a peer' if self.also else ''}"
        if not self.pair:
            return name
        form = shown(self.pair.partition("/")[2])
        return f"control of {form}" if self.role == "control" else f"{name} at the rates of {form}"

    def at(self, rate: float) -> list[Trial]:
        """The runs at a learning rate, in the order of their seeds."""
        return [self.trials[key] for key in sorted(self.trials) if key[0] == rate]

    def values(self, rate: float, metric: Metric) -> dict[int, float]:
        """The metric at a learning rate for each seed that has one."""
        found = {trial.seed: trial.value(metric) for trial in self.at(rate)}
        return {seed: value for seed, value in found.items() if value is not None}

    def medians(self, metric: Metric) -> dict[float, float]:
        """The median over seeds for each learning rate at which some seed has a value."""
        found = {rate: self.values(rate, metric) for rate in self.learning_rates}
        return {rate: statistics.median(v.values()) for rate, v in found.items() if v}

    def median_scale(self, rates: Iterable[float]) -> float | None:
        """The median over runs at these rates of each run's median of S."""
        scales = [
            trial.median_scale
            for rate in rates
            for trial in self.at(rate)
            if trial.median_scale is not None and is_number(trial.median_scale)
        ]
        return statistics.median(scales) if scales else None


@dataclass
class StudyResults:
    """A study's folder, read."""

    folder: Path
    name: str
    description: str
    scale: str
    script: str
    command: str
    pairs: tuple[Pair, ...]
    peers: tuple[Peer, ...]
    control: bool
    seeds: tuple[int, ...]
    metric: Metric
    trials: tuple[Trial, ...]
    run_again: int = 0  # lines that a later one of the same run replaces
    other_seeds: int = 0  # runs of the folder, of an earlier call with more seeds

    @cached_property
    def benchmark(self) -> Benchmark | None:
        """The part of §5 that it repeats, with the paper's data, or None."""
        found = benchmark_of(self.name)
        return found if found and self.data in ("", found.data) else None

    @property
    def data(self) -> str:
        """The names of the data that the runs had."""
        return " and ".join(sorted({_data(trial.results) for trial in self.trials} - {""}))

    @property
    def schedules(self) -> list[str]:
        """Those of the trials: first those of pairs, and the constant learning rate first."""
        found = {trial.schedule for trial in self.trials}
        return sorted(found, key=lambda s: (not self.pairs_with(s), s != CONSTANT, s))

    @property
    def measured(self) -> str:
        """What was run, as far as the results say it, for captions: data, size, seeds."""
        results = [trial.results for trial in self.trials if trial.results]
        paper = self.benchmark
        data = self.data
        samples, evaluated, epochs = (
            _range(found.get(key) for found in results)
            for key in ("train_samples", "eval_samples", "epoch")
        )
        seeds = len({trial.seed for trial in self.trials})
        parts = [
            paper.title if paper and data == paper.data else data,
            f"{samples} training {'images' if paper else 'examples'}" if samples else "",
            f"{evaluated} to evaluate on" if evaluated else "",
            f"{epochs} epoch{'' if epochs == '1' else 's'}" if epochs else "",
            f"{seeds} seed{'' if seeds == 1 else 's'}",
        ]
        text = ", ".join(part for part in parts if part)
        if paper is None:
            return text
        full = (paper.data, f"{paper.train_samples:,}", "10,000", str(paper.train_epochs))
        same = (data, samples, evaluated, epochs) == full and seeds == paper.seeds
        return f"{text}: {'the' if same else 'not the'} paper's scale"

    @property
    def planned(self) -> int:
        """How many runs the study has when it is finished."""
        keys = {trial.key for trial in self.trials}
        for pair in self.pairs:
            runs: list[tuple[str, str | None]] = [(pair.base, None), (pair.form, None)]
            runs += [(pair.base, pair.name)] if self.control else []
            keys |= self._keys(runs, pair)
        for peer in self.peers:
            keys |= self._keys([(peer.optimizer, None)], peer)
        return len(keys)

    def _keys(
        self, runs: Iterable[tuple[str, str | None]], of: Pair | Peer
    ) -> set[tuple[Any, ...]]:
        places = itertools.product(of.schedules, of.learning_rates, self.seeds)
        return {(*run, *place) for run, place in itertools.product(runs, places)}

    def pairs_with(self, schedule: str) -> list[Pair]:
        """The pairs that are run with a schedule, each once, with all its learning rates."""
        rates: dict[tuple[str, str], set[float]] = {}
        for pair in self.pairs:
            if schedule in pair.schedules:
                rates.setdefault((pair.base, pair.form), set()).update(pair.learning_rates)
        return [
            Pair(base, form, tuple(sorted(found)), (schedule,))
            for (base, form), found in rates.items()
        ]

    def arm(self, role: str, pair: Pair, schedule: str) -> Arm:
        """The runs of a pair in a role. Those of a base are of every pair with that base."""
        optimizer = pair.form if role == "form" else pair.base
        runs = self._runs(
            trial
            for trial in self.trials
            if (trial.optimizer, trial.schedule) == (optimizer, schedule)
            and trial.learning_rate in pair.learning_rates
            and (trial.role == "control") == (role == "control")
            and (role != "control" or trial.pair == pair.name)
        )
        others = [other for other in self.pairs_with(schedule) if other.base == pair.base]
        shared = len({other.learning_rates for other in others}) == 1
        named = role == "control" or (role == "base" and not shared)
        return Arm(role, optimizer, pair.name if named else None, pair.learning_rates, runs)

    def arms(self, schedule: str) -> list[Arm]:
        """For each pair base, form and control, then the peers; those without a run yet too."""
        found: dict[tuple[Any, ...], Arm] = {}
        for pair in self.pairs_with(schedule):
            for role in ROLES[:3]:
                arm = self.arm(role, pair, schedule)
                if arm.trials or role != "control" or self.control:
                    found.setdefault((role, arm.optimizer, arm.pair), arm)
        rates: dict[str, set[float]] = {}
        for peer in self.peers:
            if schedule in peer.schedules:
                rates.setdefault(peer.optimizer, set()).update(peer.learning_rates)
        there = [t for t in self.trials if t.role != "control" and t.schedule == schedule]
        of_pairs = {arm.optimizer for arm in found.values()}
        for trial in there:
            if trial.role == "peer" and trial.optimizer not in of_pairs:
                rates.setdefault(trial.optimizer, set()).add(trial.learning_rate)
        for name, own in rates.items():
            runs = self._runs(t for t in there if t.optimizer == name and t.learning_rate in own)
            also = name in of_pairs
            found["peer", name] = Arm("peer", name, None, tuple(sorted(own)), runs, also)
        return list(found.values())

    @staticmethod
    def _runs(trials: Iterable[Trial]) -> dict[tuple[float, int], Trial]:
        return {(trial.learning_rate, trial.seed): trial for trial in trials}


def _data(results: Mapping[str, Any]) -> str:
    """The name of a run's data, without the folder or the user that it is in."""
    for key in ("dataset_name", "train_file", "task_name"):
        if isinstance(name := results.get(key), str):
            return Path(name).name
    return ""


def _range(values: Iterable[Any]) -> str:
    numbers = sorted({value for value in values if is_number(value)})
    ends = dict.fromkeys([*numbers[:1], *numbers[-1:]])
    return " to ".join(f"{end:,.0f}" if end == int(end) else f"{end:.3g}" for end in ends)


# Reading


def read_study(folder: Path) -> StudyResults:
    """Reads a study's folder.

    Args:
        folder: with study.yaml and results.jsonl, as `hf-adalip sweep` writes them.

    Raises:
        UsageError: if one of them is missing or cannot be read, or no run is finished yet.
    """
    path = folder / STUDY
    settings = _read_settings(path)
    every, run_again = _read_trials(folder / ROWS)
    seeds = _seeds(settings.get("seeds"), every, path)
    trials = tuple(trial for trial in every if trial.seed in seeds)
    if not trials:
        raise UsageError(f"{folder / ROWS} has no run of the seeds of {path}")
    name = str(settings.get("name", folder.name))
    metric = str(settings.get("metric", "eval_accuracy"))
    direction = settings.get("direction")
    try:
        direction = as_direction(usual_direction(metric) if direction is None else direction)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(control := settings.get("control") or False, bool):
        raise UsageError(f"{path}: control must be true or false, without quotes, got {control!r}")
    study = StudyResults(
        folder=folder,
        name=name,
        description=str(settings.get("description") or ""),
        scale=str(settings.get("scale") or ""),
        script=str(settings.get("script") or ""),
        command=str(settings.get("command") or sweep_command(settings, path)),
        pairs=_entries(settings, "pairs", Pair, ("base", "form"), path),
        peers=_entries(settings, "peers", Peer, ("optimizer",), path),
        control=control,
        seeds=seeds,
        metric=Metric("best_train_accuracy")
        if benchmark_of(name)
        else Metric(metric, direction == "minimize"),
        trials=trials,
        run_again=run_again,
        other_seeds=len(every) - len(trials),
    )
    results = [trial.results for trial in trials if trial.outcome != "failed"]
    if results and all(trial.value(study.metric) is None for trial in trials):
        names = sorted(key for key, value in results[0].items() if is_number(value))
        raise UsageError(
            f"metric {study.metric.name!r} of {path} is in no run's results; they have "
            f"{', '.join(names)}"
        )
    return study


def sweep_command(settings: Mapping[str, Any], path: Path) -> str:
    """The command that runs a study: with its file, where it is none of those that are shipped, or
    not as it is shipped."""
    by_file = shlex.join(["hf-adalip", "sweep", str(path)])
    name, rest = str(settings.get("name")), _list(settings, "rest", path)
    extras = [str(extra) for extra in _list(settings, "extras", path)]
    scales = re.findall(r"(\d+)([a-z_]+)", str(settings.get("scale") or ""))
    if name not in shipped():
        return by_file
    try:
        by_name = load_study(name, {key: int(number) for number, key in scales}, extras).as_run()
    except UsageError:  # of another version, which had other scales or extras
        return by_file
    if any(by_name.get(key) != settings.get(key) for key in ("pairs", "peers", "seeds")):
        return by_file
    words = ["hf-adalip", "sweep", name]
    if scales:
        words += ["--scale", ",".join(f"{key}={number}" for number, key in scales)]
    if extras:
        words += ["--with", ",".join(extras)]
    if rest:
        words += ["--", *map(str, rest)]
    return shlex.join(words)


def _list(settings: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    found = settings.get(key)
    if found is not None and not isinstance(found, list):
        raise UsageError(f"{path}: {key} must be a list, got {found!r}")
    return found or []


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # .reading says how to install it

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{path.parent} is not the folder of a study: it has no {path.name}; give the folder "
            "that hf-adalip sweep wrote"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is not a study: it has no name and no pairs")
    return settings


def _entries(
    settings: Mapping[str, Any], key: str, kind: type[Any], names: tuple[str, ...], path: Path
) -> tuple[Any, ...]:
    """The pairs or peers of a study."""
    found = []
    for entry in _list(settings, key, path):
        try:
            rates = tuple(sorted(as_rates(entry["learning_rates"])))
            schedules = tuple(map(str, _list(entry, "schedules", path) or (CONSTANT,)))
            found.append(kind(*(str(entry[name]) for name in names), rates, schedules))
        except UsageError:
            raise
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            takes = ", ".join(names)
            raise UsageError(
                f"{path}: {key} has {entry!r}; each takes {takes} and learning_rates"
            ) from error
        if not rates:
            raise UsageError(f"{path}: {entry[names[-1]]} has no learning_rates")
    return tuple(found)


def _seeds(found: Any, trials: Iterable[Trial], path: Path) -> tuple[int, ...]:
    if found is None:
        return tuple(sorted({trial.seed for trial in trials}))
    try:
        return as_seeds(found)
    except ValueError as error:
        raise UsageError(f"{path}: seeds must be a list of numbers, got {found!r}") from error


def _read_trials(path: Path) -> tuple[tuple[Trial, ...], int]:
    """The last line of each run, a complete one before a failed one; and how many were replaced."""
    try:
        # not splitlines, which takes U+2028 within a string for the end of a line
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is not there: no run of the study has ended yet") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read") from error
    found: dict[tuple[Any, ...], Trial] = {}
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            trial = _trial(json.loads(line))
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                continue  # a sweep is writing it
            raise UsageError(f"{path}, line {number} is not a trial of a study") from error
        count += 1
        before = found.get(trial.key)
        if before is None or trial.outcome != "failed" or before.outcome == "failed":
            found[trial.key] = trial
    if not found:
        raise UsageError(f"{path} has no run: none of the study has ended yet")
    return tuple(found.values()), count - len(found)


def _trial(entry: dict[str, Any]) -> Trial:
    if entry["role"] not in ROLES or entry["state"] not in ("complete", "failed"):
        raise ValueError
    if entry.get("seconds") is not None and not is_number(entry["seconds"]):
        raise ValueError
    if entry["role"] == "control" and not isinstance(entry["pair"], str):
        raise ValueError
    return Trial(
        role=entry["role"],
        optimizer=str(entry["optimizer"]),
        pair=entry.get("pair"),
        schedule=str(entry.get("schedule") or CONSTANT),
        learning_rate=as_rates([entry["learning_rate"]])[0],
        seed=int(entry["seed"]),
        state=entry["state"],
        error=entry.get("error"),
        seconds=entry.get("seconds"),
        command=str(entry.get("command") or ""),
        median_scale=entry.get("median_scale"),
        results=dict(entry.get("results") or {}),
    )
