"""A study: which runs of a script there are to be."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..errors import UsageError

CONSTANT = "constant"
STUDY, ROWS, RUNS = "study.yaml", "results.jsonl", "runs"
"""What a sweep calls its files and the folder of its runs."""

RECIPES = "recipes"

Role = Literal["base", "form", "control", "peer"]
Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        role: base or form (with S) of a pair, its control (base at α × the median of the form's S),
            or peer, which belongs to no pair.
        optimizer: its name, as the script takes it.
        pair: BASE/FORM; None for a peer.
        schedule: a name among the study's schedules.
        learning_rate: α; of a control, before it is multiplied.
        seed: of the run.
    """

    role: Role
    optimizer: str
    pair: str | None
    schedule: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """The cell's name among those of the study, and of its folder."""
        name = self.optimizer
        if self.role == "control" and self.pair is not None:
            name = f"control-{self.pair.replace('/', '-')}"
        return f"{name}-{self.schedule}-{self.learning_rate:.10g}-{self.seed}"

    def __str__(self) -> str:
        name = f"control of {self.pair}" if self.role == "control" else self.optimizer
        schedule = "" if self.schedule == CONSTANT else f" {self.schedule}"
        return f"{name}{schedule} lr {self.learning_rate:.10g} seed {self.seed}"


@dataclass(frozen=True)
class Pair:
    """An optimizer without S, and the form of it with S, at the same learning rates."""

    base: str
    form: str
    learning_rates: tuple[float, ...]
    schedules: tuple[str, ...] = (CONSTANT,)

    @property
    def name(self) -> str:
        return f"{self.base}/{self.form}"


@dataclass(frozen=True)
class Peer:
    """An optimizer to compare with."""

    optimizer: str
    learning_rates: tuple[float, ...]
    schedules: tuple[str, ...] = (CONSTANT,)


@dataclass(frozen=True)
class Study:
    """What is run.

    Args:
        name: of the study.
        script: a file, or a module, with arguments that come first; in `recipes/`, one of ours.
        metric: a key of all_results.json, for "best so far".
        seeds: of every learning rate.
        description: what it is, and what was chosen where its source leaves something open.
        scale: how it was made smaller, as in "10000images-3seeds"; None for not at all.
        arguments: of the script, in every run.
        rest: further arguments of the script, as they are.
        schedules: the arguments of the script that each name stands for.
        pairs: optimizers with S and without.
        peers: optimizers to compare with.
        control: whether the base is also run at α × the median of the form's S.
        optimizer_option: the script's option that takes an optimizer; None for one without.
        direction: of the metric, maximize or minimize.
        record: of runs that are named by optimizer, learning rate and seed, more arguments.
        discard: patterns of files that are removed when a run is finished.
        extras: the extras that are in it.
    """

    name: str
    script: str
    metric: str
    seeds: tuple[int, ...]
    description: str = ""
    scale: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    peers: tuple[Peer, ...] = ()
    control: bool = False
    optimizer_option: str | None = "optim"
    direction: Direction = "maximize"
    record: tuple[Mapping[str, Any], ...] = ()
    discard: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """With the scale in it."""
        return f"{self.name}-{self.scale}" if self.scale else self.name

    def cells(self) -> list[Cell]:
        """The runs, each once: seed by seed, so that a sweep that is stopped has some of all.

        Raises:
            UsageError: if two of them would have one folder.
        """
        runs = [cell for seed in self.seeds for cell in self._runs(seed)]
        if self.control:
            runs += [cell for seed in self.seeds for cell in self._controls(seed)]
        found: dict[str, Cell] = {}
        for cell in runs:
            other = found.setdefault(cell.key, cell)  # two pairs may share the runs of a base
            if (other.optimizer, other.schedule) != (cell.optimizer, cell.schedule):
                raise UsageError(
                    f"study {self.name}: runs of {other.optimizer} with the schedule "
                    f"{other.schedule} and of {cell.optimizer} with {cell.schedule} would share "
                    f"the folder {cell.key}; rename a schedule"
                )
        return list(found.values())

    def _runs(self, seed: int) -> Iterator[Cell]:
        for pair in self.pairs:
            for schedule in pair.schedules:
                for lr in pair.learning_rates:
                    yield Cell("base", pair.base, pair.name, schedule, lr, seed)
                    yield Cell("form", pair.form, pair.name, schedule, lr, seed)
        for peer in self.peers:
            for schedule in peer.schedules:
                for lr in peer.learning_rates:
                    yield Cell("peer", peer.optimizer, None, schedule, lr, seed)

    def _controls(self, seed: int) -> Iterator[Cell]:
        for pair in self.pairs:
            for schedule in pair.schedules:
                for lr in pair.learning_rates:
                    yield Cell("control", pair.base, pair.name, schedule, lr, seed)

    def forms_of(self, control: Cell) -> list[Cell]:
        """The runs, of all seeds, whose S a control needs the median of."""
        form = str(control.pair).partition("/")[2]
        return [replace(control, role="form", optimizer=form, seed=seed) for seed in self.seeds]

    def options(self, cell: Cell, learning_rate: float, output_dir: str) -> list[str]:
        """The arguments of a cell's run.

        Args:
            cell: what is run.
            learning_rate: that the script gets, which is a multiple of the cell's for a control.
            output_dir: where the script is to write.
        """
        given = {**self.arguments, **self.schedules.get(cell.schedule, {})}
        for entry in self.record:
            wanted = {key: entry[key] for key in ("optimizer", "learning_rate", "seed")}
            if cell.role != "control" and all(getattr(cell, k) == v for k, v in wanted.items()):
                given |= entry["arguments"]
        if self.optimizer_option:
            given[self.optimizer_option] = cell.optimizer
        given |= {"learning_rate": f"{learning_rate:.10g}", "seed": cell.seed}
        return [*as_options(given), *self.rest, f"--output_dir={output_dir}"]

    def as_run(self) -> dict[str, Any]:
        """What study.yaml says."""
        found = {key: value for key, value in asdict(self).items() if value not in ((), {})}
        plain: dict[str, Any] = _plain(found)
        return plain


def is_number(value: Any) -> bool:
    """Whether it is a finite number: a diverged run has null, or NaN."""
    try:
        return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an integer that no float is
        return False


def usual_direction(metric: str) -> Direction:
    """Which way a metric is better, by its name."""
    return "minimize" if metric.endswith(("loss", "perplexity", "error")) else "maximize"


def as_direction(found: Any) -> Direction:
    """One of the two directions; ValueError for anything else."""
    if found not in get_args(Direction):
        raise ValueError(f"direction must be maximize or minimize, got {found!r}")
    return cast("Direction", found)


def as_seeds(found: Any) -> tuple[int, ...]:
    """The seeds that a number of them, or a list, stands for; ValueError for anything else."""
    seeds = range(found) if type(found) is int else found
    if not isinstance(seeds, (list, tuple, range)) or not seeds:
        raise ValueError
    if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise ValueError
    return tuple(dict.fromkeys(seeds))


def as_rates(found: Any) -> tuple[float, ...]:
    """A list of learning rates as numbers (YAML reads 1e-3 as a string); else ValueError."""
    if not isinstance(found, (list, tuple)):
        raise ValueError
    if any(isinstance(rate, bool) or not isinstance(rate, (int, float, str)) for rate in found):
        raise ValueError
    try:
        rates = tuple(dict.fromkeys(map(float, found)))
    except OverflowError as error:
        raise ValueError from error
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError
    return rates


def as_options(given: Mapping[str, Any]) -> list[str]:
    """Arguments as a command line; true and false are options without a value."""
    options = []
    for key, value in given.items():
        if isinstance(value, bool):
            options.append(f"--{key}" if value else f"--no-{key}")
        else:
            options.append(f"--{key}={value}")
    return options


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def command_words(script: str, recipes: Path) -> list[str]:
    """What Python is called with to run a study's script.

    Raises:
        UsageError: if there is no such file, saying what to do.
    """
    first, *more = shlex.split(script)
    if not first.endswith(".py"):
        return ["-m", first, *more]
    path = Path(first)
    if path.parts[0] == RECIPES:
        path = recipes.joinpath(*path.parts[1:])
        if not path.is_file():
            raise UsageError(
                f"there is no recipe {path}: recipes are not in the installed package; run in a "
                "copy of the repository, or say where its recipes are with --recipes DIR"
            )
    if not path.is_file():
        raise UsageError(f"there is no script {path}; give a path from where you are")
    return [str(path), *more]
