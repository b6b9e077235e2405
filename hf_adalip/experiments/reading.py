"""Studies in YAML: those that are shipped, and anybody's."""

from __future__ import annotations

import difflib
import re
import shlex
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..registry import get_optimizer_info
from .study import (
    CONSTANT,
    Direction,
    Pair,
    Peer,
    Study,
    as_direction,
    as_rates,
    as_seeds,
    is_number,
    usual_direction,
)

try:
    import yaml  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "hf_adalip.experiments needs pyyaml: pip install 'hf-adalip[experiments]'"
    ) from error


@dataclass(frozen=True)
class Changes:
    """What a user has instead of a study's own; None for no change."""

    script: str | None = None
    optimizers: Sequence[str] | None = None
    learning_rates: Sequence[float] | None = None
    schedules: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    @property
    def name(self) -> str:
        """What is added to the study's name, so that it is not taken for the study itself."""
        script = [Path(self.script.split()[0]).stem] if self.script else []
        return "".join(f"-{word.replace('/', '-')}" for word in [*script, *(self.optimizers or ())])


def shipped() -> dict[str, Any]:
    """The studies that come with the package, by name."""
    folder = files(__package__) / "studies"
    found = {entry.name: entry for entry in folder.iterdir()}
    return {name[:-5]: found[name] for name in sorted(found) if name.endswith(".yaml")}


def load_study(
    name: str,
    scale: Mapping[str, int] | None = None,
    extras: Collection[str] = (),
    changes: Changes | None = None,
    rest: Sequence[str] = (),
) -> Study:
    """A study by the name of one that is shipped, or the path of a YAML file.

    Args:
        name: a name or a path; study.yaml in the folder of a sweep is what that ran.
        scale: numbers that make it smaller: of seeds, and of what the study has a `scale` for.
        extras: which of its `extras` are run too; "control" there is for any study with pairs.
        changes: what to use instead of the study's own.
        rest: further arguments of the script, which win over the study's.

    Raises:
        UsageError: for an unknown name, or a file that is no study, saying what is wrong.

    Examples:
        >>> study = load_study("paper_mnist", scale={"images": 1000, "seeds": 2})
        >>> study.full_name, len(study.cells())
        ('paper_mnist-1000images-2seeds', 72)
    """
    text, name = _text(name)
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise UsageError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    return _Reader(name, found, changes or Changes()).read(scale or {}, extras, tuple(rest))


def _text(name: str) -> tuple[str, str]:
    path, known = Path(name), shipped()
    if name in known:
        return known[name].read_text(encoding="utf-8"), name
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8-sig"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the study {name}: {error}") from error
    raise UsageError(
        f"unknown study {name!r}; {_near(name, known)}there are {', '.join(known)}, or give a "
        "YAML file"
    )


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


class _Reader:
    """What a YAML file says, checked."""

    def __init__(self, name: str, found: Any, changes: Changes) -> None:
        self.name, self.changes = name, changes
        found = self.mapping(found, "the file")
        known = {entry.name for entry in fields(Study)}
        self.check_keys(found, {*known, "tune", "learning_rates"}, "the file")
        if "name" in found:
            self.name = self.plain(found["name"], "name")
        for key in ("script", "seeds"):
            found[key] = getattr(changes, key) or found.get(key)
        for key in ("script", "metric", "seeds"):
            if found.get(key) is None:
                raise self.error(f"{key} is missing")
        self.found = found
        # In study.yaml of a sweep these are names: what they stand for is in the rest of the file.
        self.had_scale: list[str] = []
        self.had_extras: list[str] = []
        if isinstance(scale := found.get("scale"), str):
            self.had_scale = [self.plain(scale, "scale")]
        if scale is None or self.had_scale:
            found["scale"] = {}
        if isinstance(found.setdefault("extras", {}), list):
            self.had_extras, found["extras"] = self.words("extras"), {}
        self.check_script(found["script"])
        option = found.setdefault("optimizer_option", "optim")
        self.own = {"learning_rate", "seed", "output_dir"}
        if option is not None and self.text("optimizer_option") in self.own:
            raise self.error(f"optimizer_option must be an option of its own, got {option!r}")
        self.own |= {option}
        schedules = self.mapping(found.get("schedules", {}), "schedules")
        self.schedules: dict[str, dict[str, Any]] = {CONSTANT: {}}
        self.schedules |= {
            self.plain(name, "each of schedules"): self.arguments(value, f"schedule {name}")
            for name, value in schedules.items()
        }
        if tune := found.get("tune"):
            found["learning_rates"] = draw(self.mapping(tune, "tune"), self.name)
        self.usual = changes.learning_rates or found.get("learning_rates")
        self.usual_is_used = False

    def read(
        self, scale: Mapping[str, int], extras: Collection[str], rest: tuple[str, ...]
    ) -> Study:
        found, known = self.found, self.mapping(self.found["extras"], "extras")
        chosen = self.chosen([extra for extra in extras if extra not in self.had_extras], known)
        for extra, group in known.items():
            self.check_keys(
                self.mapping(group, f"extra {extra}"), ("pairs", "peers"), f"extra {extra}"
            )
        every = [found, *known.values()]
        groups = [found, *(known[extra] for extra in chosen if extra in known)]
        if self.changes.optimizers:
            groups[0] = self.given(self.changes.optimizers, every)
        arguments = self.arguments(found.get("arguments", {}), "arguments")
        seeds, scale_name = self.scaled(scale, arguments)
        study = Study(
            name=self.name + self.changes.name,
            script=found["script"],
            metric=self.text("metric"),
            seeds=seeds,
            description=str(found.get("description", "")),
            scale=scale_name,
            arguments=arguments,
            rest=(*self.words("rest"), *rest),
            schedules=self.schedules,
            pairs=tuple(self.pair(entry) for g in groups for entry in self.items(g, "pairs")),
            peers=tuple(self.peer(entry) for g in groups for entry in self.items(g, "peers")),
            control=self.flag("control") or "control" in chosen,
            optimizer_option=found["optimizer_option"],
            direction=self.direction(),
            record=tuple(map(self.recorded, self.items(found, "record"))),
            discard=() if self.changes.script else self.patterns("discard"),
            extras=(*self.had_extras, *chosen),
        )
        if not study.pairs and not study.peers:
            raise self.error("neither pairs nor peers: there is no optimizer to run")
        for name in {pair.base for pair in study.pairs} & {pair.form for pair in study.pairs}:
            raise self.error(
                f"{name} is the base of a pair and the form of a pair; remove one of the two"
            )
        if study.record and self.changes == Changes():
            self.check_recorded(study, every)
        self.check_rest(study, scale)
        if self.changes.learning_rates and not self.usual_is_used:
            raise UsageError(
                f"--learning_rate: the optimizers of {self.name} have learning rates of their own; "
                "say with --optim which are to have these"
            )
        return study

    def error(self, message: str) -> UsageError:
        return UsageError(f"study {self.name}: {message}")

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(f"{what} must have lines of `key: value`, got {value!r}")
        return dict(value)

    def text(self, key: str) -> str:
        if not isinstance(value := self.found[key], str) or not value.strip():
            raise self.error(f"{key} must be a name, got {value!r}")
        return value

    def words(self, key: str) -> list[str]:
        found = self.found.get(key, [])
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise self.error(f"{key} must be a list of words, got {found!r}")
        return found

    def flag(self, key: str) -> bool:
        if not isinstance(value := self.found.get(key, False), bool):
            raise self.error(f"{key} must be true or false, without quotes, got {value!r}")
        return value

    def plain(self, value: Any, what: str) -> str:
        """A name that the folder of a run may have in its own."""
        if (
            not isinstance(value, str)
            or not (value.strip() and value.isprintable())
            or any(part in value for part in ("/", "\\", ".."))
        ):
            raise self.error(f"{what} must be a name without /, \\ and .., got {value!r}")
        return value

    def patterns(self, key: str) -> tuple[str, ...]:
        """Patterns of files in the folder of a run, and nowhere else."""
        found = self.found.get(key, [])
        if not isinstance(found, list) or not all(map(_stays_inside, found)):
            raise self.error(
                f"{key} must be a list of patterns of files in a run's folder, as in "
                f'["*.png"], got {found!r}'
            )
        return tuple(found)

    def arguments(self, value: Any, what: str) -> dict[str, Any]:
        """Of the script, but for those that every run has of its own."""
        found = self.mapping(value, what)
        for key in found:
            if str(key).lstrip("-").replace("-", "_") in self.own:
                raise self.error(f"{what} must not set {key}, which every run is given; remove it")
        return found

    def check_script(self, script: Any) -> None:
        try:
            words = shlex.split(script) if isinstance(script, str) else []
        except ValueError:  # a quotation mark without its other
            words = []
        if not words or not words[0].strip():
            raise self.error(f"script must be a file or a module, and its words, got {script!r}")

    def items(self, group: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        found = group.get(key, [])
        if not isinstance(found, list):
            raise self.error(f"{key} must be a list, got {found!r}")
        return [self.mapping(entry, f"each of {key}") for entry in found]

    def check_keys(self, found: Mapping[str, Any], known: Collection[str], what: str) -> None:
        for key in found:
            if key not in known:
                hint = _near(str(key), known)
                raise self.error(
                    f"{what} has an unknown key {key!r}; {hint}there are {', '.join(sorted(known))}"
                )

    def chosen(self, extras: Collection[str], known: Mapping[str, Any]) -> list[str]:
        for extra in extras:
            if extra != "control" and extra not in known:
                names = ", ".join(dict.fromkeys(["control", *known]))
                raise self.error(f"there is no extra {extra!r}; there are {names}")
        return [extra for extra in dict.fromkeys(["control", *known]) if extra in extras]

    def scaled(
        self, scale: Mapping[str, int], arguments: dict[str, Any]
    ) -> tuple[tuple[int, ...], str | None]:
        """The seeds and the scale's name; sets the arguments that it stands for."""
        if self.had_scale and (scale or self.changes.seeds):
            raise UsageError(
                f"--scale, --seeds: {self.name} was run at the scale {self.had_scale[0]} already; "
                "give the study itself, or change a copy of this file"
            )
        if "seeds" in scale and self.changes.seeds:
            raise UsageError("--seeds and the seeds of --scale: give one of the two")
        scales = self.mapping(self.found["scale"], "scale")
        for key, argument in scales.items():
            self.plain(key, "each of scale")
            if not isinstance(argument, str) or argument in self.own:
                raise self.error(f"scale: {key} must name an argument, got {argument!r}")
        known = list(dict.fromkeys([*scales, "seeds"]))
        for key, number in scale.items():
            if key not in known:
                raise UsageError(
                    f"--scale: {self.name} has no {key!r}; there are {', '.join(known)}"
                )
            if number < 1:
                raise UsageError(f"--scale: {key} must be at least 1, got {number}")
            if key != "seeds":
                arguments[scales[key]] = number
        seeds = scale.get("seeds", self.found["seeds"])
        try:
            numbers = as_seeds(seeds)
        except ValueError as error:
            raise self.error(
                f"seeds must be a number of them, or a list from 0 on, got {seeds!r}"
            ) from error
        parts = [*self.had_scale, *(f"{scale[key]}{key}" for key in known if key in scale)]
        return numbers, "-".join(parts) or None

    def given(self, names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The pairs and peers of --optim; those that the groups have are as they are there."""
        known: dict[Any, dict[str, Any]] = {}
        for key, name in (("pairs", "form"), ("peers", "optimizer")):
            for group in groups:
                for entry in self.items(group, key):
                    known.setdefault(entry.get(name), entry)
        own = (*self.items(self.found, "pairs"), *self.items(self.found, "peers"))
        lists = [entry["schedules"] for entry in own if "schedules" in entry]
        usual = {"schedules": lists[0]} if lists else {}
        found: dict[str, Any] = {"pairs": [], "peers": []}
        for name in names:
            base, _, form = name.rpartition("/")
            base = base or _base_of(name) or ""
            if form in known and base in ("", known[form].get("base")):
                found["pairs" if "form" in known[form] else "peers"].append(known[form])
            elif base:
                found["pairs"].append({"base": base, "form": form, **usual})
            else:
                found["peers"].append({"optimizer": name, **usual})
        return found

    def pair(self, entry: dict[str, Any]) -> Pair:
        self.check_keys(entry, {one.name for one in fields(Pair)}, "a pair")
        for key in ("base", "form"):
            if not isinstance(entry.get(key), str):
                raise self.error(f"a pair must have a {key}, got {entry!r}")
            self.plain(entry[key], f"{key} of a pair")
        if entry["base"] == entry["form"]:
            raise self.error(f"base and form of a pair must differ, got {entry['base']!r} for both")
        return Pair(entry["base"], entry["form"], *self.grid(entry))

    def peer(self, entry: dict[str, Any]) -> Peer:
        self.check_keys(entry, {one.name for one in fields(Peer)}, "a peer")
        if not isinstance(entry.get("optimizer"), str):
            raise self.error(f"a peer must have an optimizer, got {entry!r}")
        self.plain(entry["optimizer"], "optimizer of a peer")
        return Peer(entry["optimizer"], *self.grid(entry))

    def grid(self, entry: dict[str, Any]) -> tuple[tuple[float, ...], tuple[str, ...]]:
        """The learning rates and the schedules of an optimizer."""
        who = entry.get("form") or entry.get("optimizer")
        self.usual_is_used |= "learning_rates" not in entry
        rates = entry.get("learning_rates", self.usual)
        if not isinstance(rates, (list, tuple)) or not rates:
            raise self.error(f"{who} has no learning_rates; give a list of them")
        try:
            numbers = as_rates(rates)
        except ValueError as error:
            raise self.error(
                f"learning_rates of {who} must be positive numbers, got {rates!r}"
            ) from error
        names = self.changes.schedules or entry.get("schedules", [CONSTANT])
        if not isinstance(names, (list, tuple)) or not names:
            raise self.error(f"schedules of {who} must be a list, as in [constant], got {names!r}")
        for name in names:
            if not isinstance(name, str) or name not in self.schedules:
                known = ", ".join(self.schedules)
                raise self.error(f"{who}: no schedule {name!r} in schedules, which has {known}")
        return numbers, tuple(dict.fromkeys(names))

    def recorded(self, entry: dict[str, Any]) -> dict[str, Any]:
        needed = {"optimizer", "learning_rate", "seed", "arguments"}
        if set(entry) != needed:
            raise self.error(f"each of record must have {', '.join(sorted(needed))}, got {entry}")
        try:
            (rate,), (seed,) = as_rates([entry["learning_rate"]]), as_seeds([entry["seed"]])
            if not isinstance(entry["optimizer"], str):
                raise ValueError
        except ValueError as error:
            raise self.error(
                "record: optimizer must be a name, learning_rate a positive number and seed at "
                f"least 0, got {entry}"
            ) from error
        arguments = self.arguments(entry["arguments"], "arguments of record")
        return {**entry, "learning_rate": rate, "seed": seed, "arguments": arguments}

    def check_recorded(self, study: Study, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses an entry whose optimizer and learning rate no run has. Extras that were not
        chosen count, and the seed is not checked: `--scale` leaves seeds out."""
        pairs = [self.pair(entry) for group in groups for entry in self.items(group, "pairs")]
        peers = [self.peer(entry) for group in groups for entry in self.items(group, "peers")]
        rates = [(name, pair.learning_rates) for pair in pairs for name in (pair.base, pair.form)]
        rates += [(peer.optimizer, peer.learning_rates) for peer in peers]
        runs = {(name, rate) for name, each in rates for rate in each}
        for entry in study.record:
            if (entry["optimizer"], entry["learning_rate"]) not in runs:
                raise self.error(
                    f"record: there is no run of {entry['optimizer']} at learning_rate "
                    f"{entry['learning_rate']:g}; name one of pairs or peers"
                )

    def check_rest(self, study: Study, scale: Mapping[str, int]) -> None:
        """Refuses further arguments that would win over what tells the runs apart."""
        set_by: dict[str, str] = {str(option): "of every run" for option in self.own}
        for key in scale.keys() - {"seeds"}:
            set_by[self.found["scale"][key]] = f"of --scale {key}"
        for name in {cell.schedule for cell in study.cells()}:
            set_by |= dict.fromkeys(study.schedules[name], f"of the schedule {name}")
        set_by = {option.replace("-", "_"): whose for option, whose in set_by.items()}
        for word in study.rest:
            option = word.partition("=")[0].replace("-", "_")
            if option.startswith("__") and (whose := set_by.get(option[2:])):
                raise UsageError(f"{word} after -- would replace that {whose}; remove it")

    def direction(self) -> Direction:
        usual = usual_direction(str(self.found["metric"]))
        try:
            return as_direction(self.found.get("direction", usual))
        except ValueError as error:
            raise self.error(str(error)) from error


def _stays_inside(pattern: Any) -> bool:
    """Whether a pattern is of what is in a folder, so that it may be removed."""
    if not isinstance(pattern, str) or not pattern.isprintable() or re.match(r"[/\\]|\w:", pattern):
        return False
    parts = set(re.split(r"[/\\]", pattern)) - {"", "."}
    return bool(parts) and not any(
        ".." in part or ("**" in part and part != "**") for part in parts
    )


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
    numbers = all(map(is_number, (low, high, trials))) and isinstance(trials, int)
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
