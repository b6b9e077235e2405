"""What a report reads: a study's folder, its trials, and the arms that are compared in it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .paper import Benchmark, benchmark_of

STUDY, TRIALS = "study.yaml", "results.jsonl"
ROLES = ("base", "form", "control", "peer")
CONSTANT = "constant"

_NAMES = {
    **{"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSProp", "adamw": "AdamW", "nadam": "NAdam"},
    **{"adalip": "AdaLip", "adamlip": "AdamLip", "rmslip": "RMSLip"},
    **{"adalipu": "AdaLip-U", "adamlipu": "AdamLip-U", "rmslipu": "RMSLip-U"},
    **{"prodigy": "Prodigy", "schedulefree": "Schedule-free AdamW"},
}


def shown(optimizer: str) -> str:
    """An optimizer's name as the paper writes it."""
    return _NAMES.get(optimizer, optimizer)


@dataclass(frozen=True)
class Pair:
    """A base optimizer, its form with S, and the learning rates that both are run at."""

    base: str
    form: str
    learning_rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """As trials name it, "adam/adamlip"."""
        return f"{self.base}/{self.form}"


@dataclass(frozen=True)
class Trial:
    """A line of results.jsonl. `learning_rate` of a control is the form's that it answers to."""

    role: str
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
    def epochs(self) -> Sequence[Mapping[str, Any]]:
        """The numbers of each epoch, where the script writes them and did not fail."""
        return () if self.outcome == "failed" else self.results.get("epochs") or ()

    @property
    def variant(self) -> str:
        """What c_t is, as in "c=theoretical", "" if it is a constant."""
        c = (self.results.get("optimizer_arguments") or {}).get("c")
        if isinstance(c, str):
            return f"c={c}"
        found = None if self.results else re.search(r"\bc=[a-z]+", self.command)
        return found[0] if found else ""

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(epoch, value) of the epochs in which the metric is finite."""
        return [
            (float(entry["epoch"]), float(entry[metric]))
            for entry in self.epochs
            if is_number(entry.get(metric))
        ]

    def value(self, metric: str) -> float | None:
        """A metric of the run, None if it has none; "best_" before a name is over the epochs."""
        if self.outcome == "failed":
            return None
        name = metric.removeprefix("best_")
        if name != metric and (values := [value for _, value in self.curve(name)]):
            return min(values) if lower_is_better(metric) else max(values)
        found = self.results.get(metric, self.results.get(name))
        return float(found) if is_number(found) else None

    @property
    def outcome(self) -> str:
        """Either complete, diverged (it ran, a loss at its end is not finite) or failed."""
        losses = [
            value
            for name, value in self.results.items()
            if name in ("train_loss", "eval_loss", "loss")
        ]
        if losses and not all(is_number(loss) for loss in losses):
            return "diverged"
        return "complete" if self.state == "complete" else "failed"


def is_number(value: Any) -> bool:
    """Whether it is a finite number: a diverged run has null, or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is better the lower it is."""
    return metric.endswith(("loss", "perplexity", "error", "error_rate"))


@dataclass(frozen=True)
class Arm:
    """Runs of one optimizer in one role with one schedule, at each learning rate and seed."""

    role: str
    optimizer: str
    pair: str | None  # of a control; of a base only where pairs with it have other rates
    schedule: str
    variant: str
    learning_rates: tuple[float, ...]
    trials: Mapping[tuple[float, int], Trial]

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        name = shown(self.optimizer)
        if self.pair:
            form = shown(self.pair.partition("/")[2])
            if self.role == "control":
                name = f"control of {form}"
            else:
                name = f"{name} at the rates of {form}"
        return f"{name}, {self.variant}" if self.variant else name

    def at(self, rate: float) -> list[Trial]:
        """The runs at a learning rate, in the order of their seeds."""
        return [self.trials[key] for key in sorted(self.trials) if key[0] == rate]

    def values(self, rate: float, metric: str) -> dict[int, float]:
        """The metric at a learning rate for each seed that has one."""
        found = {trial.seed: trial.value(metric) for trial in self.at(rate)}
        return {seed: value for seed, value in found.items() if value is not None}

    def medians(self, metric: str) -> dict[float, float]:
        """The median over seeds for each learning rate at which some seed has a value."""
        found = {rate: self.values(rate, metric) for rate in self.learning_rates}
        return {rate: statistics.median(v.values()) for rate, v in found.items() if v}

    def median_scale(self, rates: Iterable[float]) -> float | None:
        """The median over runs at these rates of each run's median of S."""
        scales = [
            trial.median_scale
            for rate in rates
            for trial in self.at(rate)
            if is_number(trial.median_scale)
        ]
        return statistics.median(scales) if scales else None  # type: ignore[type-var]


@dataclass
class Study:
    """A study's folder, read."""

    folder: Path
    name: str
    scale: str
    script: str
    command: str
    pairs: tuple[Pair, ...]
    seeds: tuple[int, ...]
    metric: str
    trials: tuple[Trial, ...]
    run_again: int = 0  # lines that a later one of the same run replaces
    expected: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def benchmark(self) -> Benchmark | None:
        """The part of §5 that it repeats, if it does."""
        return benchmark_of(self.name)

    @property
    def schedules(self) -> list[str]:
        """Those of the trials, the constant learning rate first."""
        found = {trial.schedule for trial in self.trials}
        return sorted(found, key=lambda schedule: (schedule != CONSTANT, schedule))

    @property
    def measured(self) -> str:
        """What was run, as far as the results say it, for captions: data, size, seeds."""
        finished = [trial for trial in self.trials if trial.results]
        paper = self.benchmark
        data = " and ".join(sorted({_data(trial.results) for trial in finished} - {""}))
        samples = _range({trial.results.get("train_samples") for trial in finished})
        epochs = _range({trial.results.get("epoch") for trial in finished})
        seeds = len({trial.seed for trial in self.trials})
        parts = [
            paper.title if paper and data == paper.data else data,
            f"{samples} training {'images' if paper else 'examples'}" if samples else "",
            f"{epochs} epoch{'' if epochs == '1' else 's'}" if epochs else "",
            f"{seeds} seed{'' if seeds == 1 else 's'}",
        ]
        text = ", ".join(part for part in parts if part)
        if paper is None:
            return text
        full = (paper.data, f"{paper.train_samples:,}", str(paper.train_epochs), paper.seeds)
        own = (data, samples, epochs, seeds)
        return f"{text}: {'the' if own == full else 'not the'} paper's scale"

    def arms(self, schedule: str) -> list[Arm]:
        """For each pair base, form and control, then the peers; those without a run yet too."""
        trials = [trial for trial in self.trials if trial.schedule == schedule]
        found: dict[tuple[Any, ...], Arm] = {}
        for variant in sorted({"", *(trial.variant for trial in trials)}):
            mine = [trial for trial in trials if trial.variant == variant]
            for pair in self.pairs:
                for role in ROLES[:3]:
                    arm = self._arm(mine, role, pair, schedule, variant)
                    if arm.trials or (role != "control" and not variant):
                        key = (role, arm.optimizer, arm.pair, variant, arm.learning_rates)
                        found.setdefault(key, arm)
            peers = [trial for trial in mine if trial.role == "peer"]
            for name in dict.fromkeys(trial.optimizer for trial in peers):
                runs = _by_key(trial for trial in peers if trial.optimizer == name)
                rates = tuple(sorted({rate for rate, _ in runs}))
                arm = Arm("peer", name, None, schedule, variant, rates, runs)
                found["peer", name, variant] = arm
        return list(found.values())

    def arm(self, role: str, pair: Pair, schedule: str, variant: str = "") -> Arm:
        """The runs of a pair in a role, at the rates of the pair."""
        trials = [t for t in self.trials if (t.schedule, t.variant) == (schedule, variant)]
        return self._arm(trials, role, pair, schedule, variant)

    def _arm(
        self, trials: Iterable[Trial], role: str, pair: Pair, schedule: str, variant: str
    ) -> Arm:
        """Base runs are of every pair with that base; a control is of one pair."""
        optimizer = pair.form if role == "form" else pair.base
        runs = _by_key(
            trial
            for trial in trials
            if (trial.role, trial.optimizer) == (role, optimizer)
            and trial.learning_rate in pair.learning_rates
            and (role != "control" or trial.pair == pair.name)
        )
        rates = tuple(sorted({rate for rate, _ in runs})) if variant else pair.learning_rates
        grids = {other.learning_rates for other in self.pairs if other.base == pair.base}
        named = role == "control" or (role == "base" and len(grids) > 1)
        return Arm(role, optimizer, pair.name if named else None, schedule, variant, rates, runs)


def _by_key(trials: Iterable[Trial]) -> dict[tuple[float, int], Trial]:
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
    return " to ".join(f"{end:,.10g}" for end in ends)


def read_study(folder: Path) -> Study:
    """Reads a study's folder.

    Args:
        folder: with study.yaml and results.jsonl, as `hf-adalip sweep` writes them.

    Raises:
        UsageError: if one of them is missing or cannot be read, or no run is finished yet.
        ImportError: without pyyaml, naming the extra that has it.
    """
    settings = _read_settings(folder / STUDY)
    trials, run_again = _read_trials(folder / TRIALS)
    pairs = tuple(_pair(entry, folder / STUDY) for entry in settings.get("pairs") or ())
    seeds = settings.get("seeds", ())
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    study = Study(
        folder=folder,
        name=str(settings.get("name", folder.name)),
        scale=str(settings.get("scale", "")),
        script=str(settings.get("script", "")),
        command=str(settings.get("command", f"hf-adalip sweep {folder / STUDY}")),
        pairs=pairs,
        seeds=tuple(seeds),
        metric=str(settings.get("metric", "eval_accuracy")),
        trials=trials,
        run_again=run_again,
        settings=settings,
    )
    if study.benchmark:
        study.metric = "best_train_accuracy"
    finished = [trial for trial in trials if trial.results]
    if finished and all(trial.value(study.metric) is None for trial in finished):
        names = sorted(name for name, value in finished[0].results.items() if is_number(value))
        raise UsageError(
            f"metric {study.metric!r} of {folder / STUDY} is in no run's results; they have "
            f"{', '.join(names)}"
        )
    return study


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("reports need pyyaml: pip install 'hf-adalip[experiments]'") from error
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path.parent} is not the folder of a study: it has no {path.name}; give the folder "
            "that hf-adalip sweep wrote"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is not a study: it has no name and no pairs")
    return settings


def _pair(entry: Any, path: Path) -> Pair:
    try:
        rates = tuple(sorted(float(rate) for rate in entry["learning_rates"]))
        pair = Pair(str(entry["base"]), str(entry["form"]), rates)
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path}: pairs has {entry!r}; it takes base, form and learning_rates"
        ) from error
    if not rates:
        raise UsageError(f"{path}: the pair {pair.name} has no learning_rates")
    return pair


def _read_trials(path: Path) -> tuple[tuple[Trial, ...], int]:
    """The last line of each run, a complete one before a failed one; and how many were replaced."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                continue  # a sweep is writing it
            raise UsageError(f"{path}, line {number} is not a trial of a study") from error
        count += 1
        pair = trial.pair if trial.role == "control" else None
        key = (
            *(trial.role, trial.optimizer, pair, trial.schedule, trial.variant),
            *(trial.learning_rate, trial.seed),
        )
        if not (key in found and found[key].outcome == "complete" != trial.outcome):
            found[key] = trial
    if not found:
        raise UsageError(f"{path} has no run: none of the study has ended yet")
    return tuple(found.values()), count - len(found)


def _trial(entry: dict[str, Any]) -> Trial:
    if entry["role"] not in ROLES or entry["state"] not in ("complete", "failed"):
        raise ValueError
    return Trial(
        role=entry["role"],
        optimizer=str(entry["optimizer"]),
        pair=entry.get("pair"),
        schedule=str(entry.get("schedule") or CONSTANT),
        learning_rate=float(entry["learning_rate"]),
        seed=int(entry["seed"]),
        state=entry["state"],
        error=entry.get("error"),
        seconds=entry.get("seconds"),
        command=str(entry.get("command") or ""),
        median_scale=entry.get("median_scale"),
        results=dict(entry.get("results") or {}),
    )
