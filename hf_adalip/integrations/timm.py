"""timm: every name of the registry as an `--opt` of timm's scripts and factory."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..optim import Lipschitz, Secant
from ..registry import LIP_PREFIX, OptimizerInfo, get_optimizer_info, list_optimizers


def register() -> None:
    """Registers the names with timm: `create_optimizer_v2(model, "adamlip")`.

    timm's own conventions hold: where an optimizer has a momentum, timm passes 0.9 unless told
    otherwise (pass momentum=0 for the paper's AdaLip); arguments of `--opt-kwargs` go through.
    timm gives no parameter names, so layers are tensors (as by default in the classes, which are
    what timm's registry holds); for layers="module" pass
    `param_group_fn=lambda model: parameter_groups(model, weight_decay)`, of `hf_adalip.layers`.

    `secant-` names are for loops of one's own, which pass `model=model` on to `Secant` and step it
    with a closure: timm's train.py has none, and the first step says so.

    An optimizer without weight decay, which timm always passes, is left out; it warns of those
    that were registered here.

    Raises:
        ImportError: if timm is not there, or is a version without an optimizer registry.
        ValueError: if timm has an optimizer of its own by a name of the registry.
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise ImportError(
            f"cannot register with timm: {error}. pip install 'hf-adalip[timm]' has one that works"
        ) from error
    known = set(default_registry.list_optimizers())
    new = []
    for name in list_optimizers():
        info = get_optimizer_info(name)
        if name not in known:
            new.append(info)
        elif default_registry.get_optimizer_info(name).opt_class is not _class_of(info):
            raise ValueError(
                f"cannot register {name!r} with timm, which has an optimizer of that name; "
                "give it another in OptimizerInfo"
            )
    for info in new:
        name = info.name
        takes = inspect.signature(info.arguments_of).parameters
        if "weight_decay" not in takes:
            if not name.startswith(LIP_PREFIX):
                cls = info.arguments_of.__name__
                warnings.warn(
                    f"{name} is not registered with timm, which always passes weight_decay: "
                    f"{cls} takes none",
                    stacklevel=2,
                )
            continue
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=_class_of(info),
                description=info.description,
                has_eps="eps" in takes,
                has_momentum="momentum" in takes,
                has_betas="betas" in takes,
                defaults=dict(info.defaults) or None,
            )
        )


_wrapped: dict[tuple[str, type[Optimizer]], type[Any]] = {}
"""The classes that timm has of `lip-` and `secant-` names."""


def _class_of(info: OptimizerInfo) -> type[Optimizer]:
    """The class that timm calls with parameters and arguments.

    `Lipschitz` and `Secant` are called with an optimizer instead: for a `lip-` or `secant-` name it
    is a class that makes that optimizer first, and whose instances are plain ones of them.
    """
    kind, base = info.optimizer_class, info.base
    if kind not in (Lipschitz, Secant) or base is None:
        return kind

    def new(_: type[Optimizer], params: ParamsT, **arguments: Any) -> Optimizer:
        return info.create(params, **arguments)

    key = info.name, base
    if key not in _wrapped:
        _wrapped[key] = type(f"{kind.__name__}{base.__name__}", (kind,), {"__new__": new})
    return _wrapped[key]
