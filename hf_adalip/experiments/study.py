"""A study: which runs of a script there are to be."""

from __future__ import annotations

import difflib
import shlex
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..registry import get_optimizer_info

try:
    import yaml  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "hf_adalip.experiments needs pyyaml: pip install 'hf-adalip[experiments]'"
    ) from error

CONSTANT = "constant"
RECIPES = "recipes"

Role = Literal["base", "form", "control", "peer"]


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
    direction: Literal["maximize", "minimize"] = "maximize"
    record: tuple[Mapping[str, Any], ...] = ()
    discard: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """With the scale in it."""
        return f"{self.name}-{self.scale}" if self.scale else self.name

    def cells(self) -> list[Cell]:
        """The runs, each once: seed by seed, so that a sweep that is stopped has some of all."""
        runs = [cell for seed in self.seeds for cell in self._runs(seed)]
        if self.control:
            runs += [cell for seed in self.seeds for cell in self._controls(seed)]
        found: dict[str, Cell] = {}
        for cell in runs:
            found.setdefault(cell.key, cell)  # two pairs may share the runs of a base
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
        found = {key: value for key, value in asdict(self).items() if value not in ((), {}, None)}
        found["scale"] = self.scale
        plain: dict[str, Any] = _plain(found)
        return plain


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


def shipped() -> dict[str, Any]:
    """The studies that come with the package, by name."""
    folder = files(__package__) / "studies"
    found = {entry.name: entry for entry in folder.iterdir()}
    return {name[:-5]: found[name] for name in sorted(found) if name.endswith(".yaml")}


def load_study(
    name: str,
    scale: Mapping[str, int] | None = None,
    extras: Collection[str] = (),
    changes: Mapping[str, Any] | None = None,
    rest: Sequence[str] = (),
) -> Study:
    """A study by the name of one that is shipped, or the path of a YAML file.

    Args:
        name: a name or a path.
        scale: numbers that make it smaller: of seeds, and of what the study has a `scale` for.
        extras: which of its `extras` are run too; "control" there is for any study with pairs.
        changes: of `script`, `optimizers`, `learning_rates` and `seeds`, what to use instead.
        rest: further arguments of the script, which win over the study's.

    Raises:
        UsageError: for an unknown name, or a file that is no study, saying what is wrong.
    """
    text, name = _text(name)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    return _Reader(name, found).read(scale or {}, extras, changes or {}, tuple(rest))


def _text(name: str) -> tuple[str, str]:
    path, known = Path(name), shipped()
    if name in known:
        return known[name].read_text(encoding="utf-8"), name
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the study {name}: {error}") from error
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"unknown study {name!r}; {hint}there are {', '.join(known)}, or give a YAML file"
    )


_READ_ELSEWHERE = ("tune", "learning_rates")
"""What a file may have besides the fields of a Study."""


class _Reader:
    """What a YAML file says, checked."""

    def __init__(self, name: str, found: Any) -> None:
        self.name = name
        self.found = self.mapping(found, "the file")
        own = {"name", "rest", "scale", "extras"}
        known = {entry.name for entry in fields(Study)} - own
        self.check_keys(self.found, {*known, *_READ_ELSEWHERE, "scale", "extras"}, "the file")

    def read(
        self,
        scale: Mapping[str, int],
        extras: Collection[str],
        changes: Mapping[str, Any],
        rest: tuple[str, ...],
    ) -> Study:
        found = {**self.found}
        found |= {
            key: changes[key] for key in ("script", "learning_rates", "seeds") if changes.get(key)
        }
        for key in ("script", "metric", "seeds"):
            if not found.get(key):
                raise self.error(f"{key} is missing")
        arguments = self.mapping(found.get("arguments", {}), "arguments")
        scales = self.mapping(found.pop("scale", {}), "scale")
        known = self.mapping(found.pop("extras", {}), "extras")
        chosen = self.chosen(extras, known)
        seeds, name = self.scaled(scale, scales, arguments, found["seeds"])
        if tune := found.pop("tune", None):
            found["learning_rates"] = draw(self.mapping(tune, "tune"), self.name)
        usual = found.pop("learning_rates", None)
        groups = [found, *(self.mapping(known[extra], extra) for extra in chosen if extra in known)]
        if names := changes.get("optimizers"):
            groups[0] = {**found, **self.given(names, found)}
        schedules = {CONSTANT: {}, **self.mapping(found.get("schedules", {}), "schedules")}
        pairs = [
            self.pair(entry, usual, schedules) for g in groups for entry in self.items(g, "pairs")
        ]
        peers = [
            self.peer(entry, usual, schedules) for g in groups for entry in self.items(g, "peers")
        ]
        if not pairs and not peers:
            raise self.error("neither pairs nor peers: there is no optimizer to run")
        lists = {key: tuple(found.pop(key, ())) for key in ("record", "discard")}
        return Study(
            **{
                **found,
                **lists,
                "name": self.name,
                "seeds": seeds,
                "scale": name,
                "arguments": arguments,
                "rest": rest,
                "schedules": schedules,
                "pairs": tuple(pairs),
                "peers": tuple(peers),
                "control": bool(found.get("control", False)) or "control" in chosen,
                "direction": self.direction(found),
                "extras": tuple(chosen),
            }
        )

    def error(self, message: str) -> UsageError:
        return UsageError(f"study {self.name}: {message}")

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(f"{what} must have lines of `key: value`, got {value!r}")
        return dict(value)

    def items(self, group: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        found = group.get(key, [])
        if not isinstance(found, list):
            raise self.error(f"{key} must be a list, got {found!r}")
        return [self.mapping(entry, f"each of {key}") for entry in found]

    def check_keys(self, found: Mapping[str, Any], known: Collection[str], what: str) -> None:
        for key in found:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = (
                    f"; did you mean {near[0]}?"
                    if near
                    else f"; there are {', '.join(sorted(known))}"
                )
                raise self.error(f"{what} has an unknown key {key!r}{hint}")

    def chosen(self, extras: Collection[str], known: Mapping[str, Any]) -> list[str]:
        for extra in extras:
            if extra != "control" and extra not in known:
                raise self.error(
                    f"there is no extra {extra!r}; there are {', '.join(['control', *known])}"
                )
        return [extra for extra in ("control", *known) if extra in extras]

    def scaled(
        self,
        scale: Mapping[str, int],
        scales: Mapping[str, Any],
        arguments: dict[str, Any],
        seeds: Any,
    ) -> tuple[tuple[int, ...], str | None]:
        """The seeds and the scale's name; sets the arguments that it stands for."""
        for key, number in scale.items():
            if key not in (*scales, "seeds"):
                known = ", ".join([*scales, "seeds"])
                raise UsageError(f"--scale: {self.name} has no {key!r}; there are {known}")
            if number < 1:
                raise UsageError(f"--scale: {key} must be at least 1, got {number}")
            if key != "seeds":
                arguments[scales[key]] = number
        seeds = scale.get("seeds", seeds)
        seeds = range(seeds) if isinstance(seeds, int) else seeds
        if not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or not seeds:
            raise self.error(f"seeds must be a number of them, or a list from 0 on, got {seeds!r}")
        parts = [f"{scale[key]}{key}" for key in (*scales, "seeds") if key in scale]
        return tuple(seeds), "-".join(parts) or None

    def given(self, names: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
        """The pairs and peers of --optim; peers of the study stay."""
        pairs, peers = [], [*self.items(found, "peers")]
        schedules = [
            entry["schedules"] for entry in self.items(found, "pairs") if "schedules" in entry
        ]
        more = {"schedules": schedules[0]} if schedules else {}
        for name in names:
            base, _, form = name.rpartition("/")
            if not base:
                base = _base_of(name) or ""
            if base:
                pairs.append({"base": base, "form": form, **more})
            else:
                peers = [entry for entry in peers if entry.get("optimizer") != name]
                peers.append({"optimizer": name, **more})
        return {"pairs": pairs, "peers": peers}

    def pair(self, entry: dict[str, Any], usual: Any, schedules: Mapping[str, Any]) -> Pair:
        self.check_keys(entry, {one.name for one in fields(Pair)}, "a pair")
        for key in ("base", "form"):
            if not isinstance(entry.get(key), str):
                raise self.error(f"a pair must have a {key}, got {entry!r}")
        return Pair(entry["base"], entry["form"], *self.grid(entry, usual, schedules))

    def peer(self, entry: dict[str, Any], usual: Any, schedules: Mapping[str, Any]) -> Peer:
        self.check_keys(entry, {one.name for one in fields(Peer)}, "a peer")
        if not isinstance(entry.get("optimizer"), str):
            raise self.error(f"a peer must have an optimizer, got {entry!r}")
        return Peer(entry["optimizer"], *self.grid(entry, usual, schedules))

    def grid(
        self, entry: dict[str, Any], usual: Any, schedules: Mapping[str, Any]
    ) -> tuple[tuple[float, ...], tuple[str, ...]]:
        who = entry.get("form") or entry.get("optimizer")
        rates = entry.get("learning_rates") or usual
        if not isinstance(rates, (list, tuple)) or not rates:
            raise self.error(f"{who} has no learning_rates; give a list of them")
        try:
            numbers = tuple(float(rate) for rate in rates)
        except (TypeError, ValueError):
            numbers = (-1.0,)
        if not all(0 < number < float("inf") for number in numbers):
            raise self.error(f"learning_rates of {who} must be positive numbers, got {rates!r}")
        names = entry.get("schedules") or [CONSTANT]
        for name in names:
            if name not in schedules:
                known = ", ".join(schedules)
                raise self.error(f"{who}: no schedule {name!r} in schedules, which has {known}")
        return numbers, tuple(names)

    def direction(self, found: Mapping[str, Any]) -> Literal["maximize", "minimize"]:
        lower = str(found["metric"]).endswith(("loss", "perplexity", "error"))
        given = found.get("direction", "minimize" if lower else "maximize")
        if given not in ("maximize", "minimize"):
            raise self.error(f"direction must be maximize or minimize, got {given!r}")
        return "minimize" if given == "minimize" else "maximize"


def _base_of(name: str) -> str | None:
    """What the script calls the base of an optimizer with S; None for one without."""
    try:
        info = get_optimizer_info(name)
    except ValueError:  # it may be a name of the script's own
        return None
    return info.base.__name__.lower() if info.takes_layers and info.base else None


def draw(tune: Mapping[str, Any], name: str) -> list[float]:
    """Learning rates from a low-discrepancy sequence, evenly spread in their logarithm.

    The same ones for every optimizer and on every machine.

    Raises:
        UsageError: if `tune` has not low, high and trials.
    """
    import optuna

    keys = ("low", "high", "trials")
    low, high, trials = (tune.get(key, -1) for key in keys)
    numbers = all(isinstance(value, (int, float)) for value in (low, high, trials))
    if set(tune) != set(keys) or not numbers or not 0 < low < high or trials < 1:
        raise UsageError(
            f"study {name}: tune must have low, high (learning rates) and trials, got {dict(tune)}"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=0)
    study = optuna.create_study(sampler=sampler)
    found = []
    for _ in range(int(trials) + 1):
        trial = study.ask()
        found.append(float(f"{trial.suggest_float('learning_rate', low, high, log=True):.3g}"))
        study.tell(trial, 0.0)
    return sorted(set(found[1:]))  # before the first, the sampler does not know what it samples


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
