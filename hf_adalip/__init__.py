"""AdaLip: a Lipschitz-adaptive learning rate per layer (Ioannou, Tagaris, Stafylopatis 2023)."""

import importlib
from typing import TYPE_CHECKING, Any

from .optim import (
    AdaLip,
    AdaLipU,
    AdamLip,
    AdamLipU,
    LionLip,
    Lipschitz,
    RMSLip,
    RMSLipU,
    Secant,
    release_gradients,
)
from .registry import (
    OptimizerInfo,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
)
from .version import __version__

if TYPE_CHECKING:
    from .integrations.trainer import attach, register, trainer_kwargs
    from .over import LipschitzOver, SecantOver

__all__ = [
    "AdaLip",
    "AdaLipU",
    "AdamLip",
    "AdamLipU",
    "LionLip",
    "Lipschitz",
    "LipschitzOver",
    "OptimizerInfo",
    "RMSLip",
    "RMSLipU",
    "Secant",
    "SecantOver",
    "__version__",
    "attach",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "register",
    "register_optimizer",
    "release_gradients",
    "trainer_kwargs",
]


_LAZY = {
    **dict.fromkeys(("attach", "register", "trainer_kwargs"), "integrations.trainer"),
    **dict.fromkeys(("LipschitzOver", "SecantOver"), "over"),
}
"""What is imported when it is first asked for, and the module that it is in."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
