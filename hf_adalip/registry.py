"""The optimizers by name: records, listing, and making one for a model."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, cast, overload

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .layers import parameter_groups
from .optim import (
    AdaLip,
    AdaLipU,
    AdamLip,
    AdamLipU,
    LayerwiseOptimizer,
    LionLip,
    Lipschitz,
    RMSLip,
    RMSLipU,
    Secant,
)
from .optim.groups import STRUCTURE, checked_params
from .optim.optimizer import LipOptimizer
from .optim.secant.optimizer import NUMBERS

LIP_PREFIX = "lip-"
SECANT_PREFIX = "secant-"

NOT_DESCRIBED = {  # structure, or how rather than what is computed
    *("params", *STRUCTURE, "lr", "initial_lr", "lipschitz_step"),
    *("foreach", "fused", "capturable", "differentiable"),
    *("reference_lr", "effective_lr", *NUMBERS),
}

_WHAT_AND_WHICH = {"model_or_params", "params", "optimizer", "name", "defaults"}
"""What an optimizer is for, and which it is, are no arguments among others."""

_UNSUITED = {"lbfgs", "sparseadam", "asgd"}
"""Several gradients a step; sparse gradients; iterates of its own."""

_UNSUITED_FOR_SECANT = {"rprop"}
"""It sets step sizes of its own."""


PEERS = {
    "prodigy": ("prodigyopt", "Prodigy"),
    "adamwschedulefree": ("schedulefree", "AdamWScheduleFree"),
}
"""Optimizers of other packages to compare with: package and class by name."""


@dataclass(frozen=True)
class OptimizerInfo:
    """What is known of an optimizer.

    Args:
        name: in lower case, without underscores (timm splits names at them).
        optimizer_class: a torch.optim.Optimizer class.
        base: the class that S is on top of; for a `lip-` or `secant-` name, the one that is
            wrapped.
        signal: what S is estimated from; None for an optimizer without S.
        reference: the algorithm or equation in the paper.
        defaults: arguments that differ from the class's own defaults.
        description: a line for listings.
    """

    name: str
    optimizer_class: type[Optimizer]
    base: type[Optimizer] | None = None
    signal: Literal["gradient", "update"] | None = None
    reference: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r}")
        if not self.name or self.name != self.name.lower() or "_" in self.name:
            raise ValueError(f"name must be lower case and without underscores, got {self.name!r}")
        if not (
            isinstance(self.optimizer_class, type) and issubclass(self.optimizer_class, Optimizer)
        ):
            raise TypeError(
                "optimizer_class must be a subclass of torch.optim.Optimizer, "
                f"got {self.optimizer_class!r}"
            )
        if issubclass(self.optimizer_class, (Lipschitz, Secant)) and self.base is None:
            raise ValueError(
                f"{self.optimizer_class.__name__} is over a base optimizer: a name with "
                f"{LIP_PREFIX} or {SECANT_PREFIX} before the base's is known already"
            )
        if not isinstance(self.defaults, Mapping):
            raise TypeError(f"defaults must be a mapping of arguments, got {self.defaults!r}")
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))
        if not self.description and self.base is not None:
            text = f"{self.base.__name__} with a learning rate per layer, from its {self.signal}s"
            if self.optimizer_class is Secant:
                text = f"{self.base.__name__} at a learning rate that it finds (experimental)"
            object.__setattr__(self, "description", text)

    @property
    def arguments_of(self) -> type[Optimizer]:
        """The class whose signature has the base optimizer's own arguments."""
        wraps = self.optimizer_class in (Lipschitz, Secant)
        return self.base if wraps and self.base else self.optimizer_class

    @property
    def takes_layers(self) -> bool:
        """Whether it has an S per layer, and so a `layers` argument."""
        return self.signal is not None

    @property
    def is_ours(self) -> bool:
        """Whether it has an S per layer, or finds its learning rate: what `attach` is for."""
        return issubclass(self.optimizer_class, (LayerwiseOptimizer, Secant))

    def check_names(self, arguments: Mapping[str, Any]) -> None:
        """Raises TypeError for an argument that it does not take, or that is not the user's."""
        known = {
            **inspect.signature(self.optimizer_class).parameters,
            **inspect.signature(self.arguments_of).parameters,
        }
        known = {name: p for name, p in known.items() if name not in _WHAT_AND_WHICH}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
        for name in arguments:
            if name in _WHAT_AND_WHICH or (name not in known and not takes_any):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{self.name} has no argument {name!r}; {hint}")

    def create(self, params: ParamsT, **arguments: Any) -> Optimizer:
        """An optimizer over `params`; `arguments` win over `defaults`.

        For a `lip-` name, arguments of `Lipschitz` go there, and the others to the base; `fused`
        is for both, where the base has it. For a `secant-` name likewise with `Secant`.

        Raises:
            TypeError: for an argument that the class does not take.
        """
        make = cast("Any", self.optimizer_class)
        if issubclass(self.optimizer_class, (Lipschitz, Secant)):
            base, arguments = self.create_base(params, arguments)
            return cast("Optimizer", make(base, **arguments))
        arguments = self._checked(arguments)
        return cast("Optimizer", make(checked_params(params), **arguments))

    def create_base(
        self, params: ParamsT, arguments: Mapping[str, Any]
    ) -> tuple[Optimizer, dict[str, Any]]:
        """The optimizer that is wrapped, and what of the arguments is the wrapper's."""
        arguments = self._checked(arguments)
        base = cast("Any", self.base)
        own = set(inspect.signature(self.optimizer_class).parameters) - {"optimizer"}
        shared = {"fused"} & set(inspect.signature(base).parameters)
        of_base = {key: value for key, value in arguments.items() if key not in own - shared}
        made = base(checked_params(params), **of_base)
        return made, {key: value for key, value in arguments.items() if key in own}

    def _checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {**self.defaults, **arguments}
        self.check_names(arguments)
        return arguments


_REGISTRY: dict[str, OptimizerInfo] = {}


def register_optimizer(info: OptimizerInfo) -> None:
    """Adds an optimizer under its name.

    Raises:
        ValueError: if `get_optimizer_info` knows the name already.
        TypeError: for what is no OptimizerInfo.
    """
    if not isinstance(info, OptimizerInfo):
        raise TypeError(f"info must be an OptimizerInfo, got {info!r}")
    if _find(info.name) is not None:
        raise ValueError(f"there is an optimizer {info.name!r} already; choose another name")
    _REGISTRY[info.name] = info


@overload
def list_optimizers(filter: str = "*", with_description: Literal[False] = False) -> list[str]: ...
@overload
def list_optimizers(
    filter: str = "*", *, with_description: Literal[True]
) -> list[tuple[str, str]]: ...
def list_optimizers(
    filter: str = "*", with_description: bool = False
) -> list[str] | list[tuple[str, str]]:
    """Names: the registered ones, and `lip-` and `secant-` over the optimizers of torch.

    Args:
        filter: a wildcard pattern, such as "adam*" or "lip-*".
        with_description: (name, description) pairs instead of names.

    Raises:
        TypeError: for a filter that is no string.

    Examples:
        >>> list_optimizers("adamlip*")
        ['adamlip', 'adamlipu']
    """
    if not isinstance(filter, str):
        raise TypeError(f'filter must be a pattern such as "adam*", got {filter!r}')
    torchs = _torch_optimizers()
    names = [*_REGISTRY, *(LIP_PREFIX + name for name in torchs)]
    names += [SECANT_PREFIX + name for name in torchs if name not in _UNSUITED_FOR_SECANT]
    found = sorted(name for name in names if fnmatchcase(name, filter.lower()))
    if with_description:
        return [(name, get_optimizer_info(name).description) for name in found]
    return found


def get_optimizer_info(name: str) -> OptimizerInfo:
    """The record of a name.

    A registered name; `lip-NAME` and `secant-NAME`, for `Lipschitz` and `Secant` over the optimizer
    NAME of torch or, if it is installed, timm; or, to compare with, the plain name of a torch
    optimizer ("adam", "sgd"), "prodigy" of prodigyopt or "adamwschedulefree" of schedulefree. Not
    LBFGS, SparseAdam and ASGD, which neither can be put on top of, nor Rprop under `Secant`.

    Raises:
        ValueError: for an unknown name, with the nearest known ones; for one of a package that is
            not installed.
        TypeError: for what is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f'name must be a string such as "adamlip", got {name!r}')
    key = name.lower()
    if (info := _find(key)) is not None:
        return info
    known = [*list_optimizers(), *_torch_optimizers(), *PEERS]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    missing = "" if _has_timm() else ", which is not installed"
    raise ValueError(
        f"unknown optimizer {name!r}; {hint}list_optimizers() has {', '.join(_REGISTRY)}, "
        f"and lip-NAME and secant-NAME for NAME of torch or timm{missing}"
        f" (none for {', '.join(sorted(_UNSUITED))})"
    )


def _find(key: str) -> OptimizerInfo | None:
    if key in _REGISTRY:
        return _REGISTRY[key]
    for prefix, wrapper in ((LIP_PREFIX, Lipschitz), (SECANT_PREFIX, Secant)):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            refused = wrapper is Secant and name in _UNSUITED_FOR_SECANT
            found = None if refused else _base_optimizer(name)
            return found and _wrapping(key, wrapper, *found)
    if key in _torch_optimizers():
        cls = _torch_optimizers()[key]
        return OptimizerInfo(key, cls, base=cls, description=f"torch.optim.{cls.__name__}")
    if key in PEERS:
        package, name = PEERS[key]
        try:
            cls = getattr(importlib.import_module(package), name)
        except ImportError as error:
            raise ValueError(f"{key} needs {package}: pip install {package}") from error
        return OptimizerInfo(key, cls, base=cls, description=f"{package}.{name}")
    return None


def _wrapping(
    name: str, wrapper: type[Lipschitz | Secant], base: type[Optimizer], defaults: dict[str, Any]
) -> OptimizerInfo:
    if wrapper is Lipschitz:
        return OptimizerInfo(name, Lipschitz, base, "gradient", "Eqs. 6-9", defaults)
    # the rate found does not depend on it, and a group's lr then is what the schedule says
    return OptimizerInfo(name, Secant, base, defaults={**defaults, "lr": 1.0})


def get_wrapper_info(wrapper: type[Lipschitz | Secant], base: str) -> OptimizerInfo:
    """The record of `Lipschitz` or `Secant` over a base optimizer.

    Args:
        wrapper: one of the two classes.
        base: NAME of a `lip-` or `secant-` name, or the path of a class ("package.module.Class").

    Raises:
        ValueError: for an unknown name, or a path that leads to no class of an optimizer.
        TypeError: for what is no string.
    """
    if not isinstance(base, str):
        raise TypeError(f'base must be a string such as "adamw", got {base!r}')
    prefix = LIP_PREFIX if wrapper is Lipschitz else SECANT_PREFIX
    if "." not in base:
        if (info := _find(prefix + base.lower())) is not None:
            return info
        unsuited = _UNSUITED | (_UNSUITED_FOR_SECANT if wrapper is Secant else set())
        names = [name for name in _torch_optimizers() if name not in unsuited]
        raise ValueError(
            f"base must be one of {', '.join(names)}, an optimizer of timm, or the path of a "
            f"class, such as torch.optim.AdamW (not {', '.join(sorted(unsuited))}), got {base!r}"
        )
    try:
        found = pkgutil.resolve_name(base)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"base={base!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"base={base!r} is no class of a torch.optim.Optimizer")
    return _wrapping(prefix + found.__name__.lower().replace("_", ""), wrapper, found, {})


def create_optimizer(
    model_or_params: nn.Module | ParamsT,
    name: str,
    lr: float | torch.Tensor | None = None,
    weight_decay: float | None = None,
    **arguments: Any,
) -> Optimizer:
    """An optimizer by name.

    Args:
        model_or_params: a model, or what torch optimizers take. From a model come the
            parameters' names, `layers="module"` as the default, for `Secant` its `model`, and the
            weight-decay split of `parameter_groups`.
        name: see `get_optimizer_info`.
        lr: learning rate; None for the optimizer's default. For a `secant-` name only what a
            schedule multiplies, 1 by default.
        weight_decay: λ; None for what was registered as the name's default, else 0 (also for
            AdamW, whose class has 0.01).
        **arguments: of the optimizer.

    Raises:
        ValueError: for an unknown name or a bad value.
        TypeError: for an argument that the optimizer does not take.

    Examples:
        >>> optimizer = create_optimizer(nn.Linear(4, 2), "adamlip", lr=1e-3, gamma=0.9)
        >>> type(optimizer).__name__, optimizer.layers
        ('AdamLip', 'module')
    """
    info = get_optimizer_info(name)
    given = {"lr": lr, "weight_decay": weight_decay}
    arguments |= {key: value for key, value in given.items() if value is not None}
    arguments = {"weight_decay": 0.0, **info.defaults, **arguments}
    params: Any = model_or_params
    if isinstance(model_or_params, nn.Module):
        split = not issubclass(info.optimizer_class, LipOptimizer)
        params = parameter_groups(model_or_params, arguments["weight_decay"], split)
        if info.takes_layers:
            arguments.setdefault("layers", "module")
        if info.optimizer_class is Secant:
            arguments.setdefault("model", model_or_params)
    takes_decay = "weight_decay" in inspect.signature(info.arguments_of).parameters
    if not takes_decay and not arguments["weight_decay"]:
        del arguments["weight_decay"]  # Rprop, for one, has none
    return info.create(params, **arguments)


def initial_lr(group: Mapping[str, Any]) -> Any:
    """The learning rate of a parameter group before any schedule."""
    return group.get("initial_lr", group["lr"])


def describe_optimizer(optimizer: Optimizer) -> str:
    """An optimizer and its hyperparameters in a line, for model cards and results.

    The learning rate is the one before any schedule (`rate` for the one that `Secant` has found so
    far); of values that differ between groups, those of the first group with the largest weight
    decay.
    """
    group = max(optimizer.param_groups, key=lambda group: group.get("weight_decay", 0.0))
    shown: dict[str, Any] = {"lr": initial_lr(group)}
    if isinstance(optimizer, Secant):
        shown = optimizer.hyperparameters
    shown |= {key: group[key] for key in group if key not in NOT_DESCRIBED}
    name = type(optimizer).__name__
    if isinstance(optimizer, (Lipschitz, Secant)):
        name = f"{name}({type(optimizer.optimizer).__name__})"
    if isinstance(optimizer, Lipschitz):
        shown |= optimizer.hyperparameters
    if isinstance(optimizer, LayerwiseOptimizer):
        shown["layers"] = optimizer.layers
    values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in shown.items()}
    return f"{name} with {', '.join(f'{key}={value}' for key, value in values.items())}"


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    found = {
        cls.__name__.lower(): cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    return {name: cls for name, cls in sorted(found.items()) if name not in _UNSUITED}


def _has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def _base_optimizer(name: str) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """The class that a name of torch or timm stands for, and the arguments that it stands for."""
    if name in _torch_optimizers():
        return _torch_optimizers()[name], {}
    if not _has_timm():
        return None
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    if name not in list_optimizers():
        return None
    found = get_optimizer_class(name, bind_defaults=False)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        return None
    if issubclass(found, LayerwiseOptimizer):  # ours, which timm has from `integrations.timm`
        return None
    return found, dict(get_optimizer_info(name).defaults or {})


_SGD, _RMSPROP, _ADAM = torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam
for _info in (
    OptimizerInfo("adalip", AdaLip, _SGD, "gradient", "Algorithm 2"),
    OptimizerInfo("rmslip", RMSLip, _RMSPROP, "gradient", "Algorithm 3"),
    OptimizerInfo("adamlip", AdamLip, _ADAM, "gradient", "Algorithm 4"),
    OptimizerInfo("adalipu", AdaLipU, _SGD, "update", "Algorithm 5"),
    OptimizerInfo("rmslipu", RMSLipU, _RMSPROP, "update", "Appendix C"),
    OptimizerInfo("adamlipu", AdamLipU, _ADAM, "update", "Appendix C"),
    OptimizerInfo(
        "lionlip",
        LionLip,
        signal="gradient",
        reference="Eqs. 6-9",
        description="Lion with a learning rate per layer, from its gradients",
    ),
):
    register_optimizer(_info)
