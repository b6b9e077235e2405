"""AdaLip: a Lipschitz-adaptive learning rate per layer (Ioannou, Tagaris, Stafylopatis 2023)."""

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

__all__ = [
    "AdaLip",
    "AdaLipU",
    "AdamLip",
    "AdamLipU",
    "LionLip",
    "Lipschitz",
    "OptimizerInfo",
    "RMSLip",
    "RMSLipU",
    "Secant",
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


def __getattr__(name: str) -> Any:
    """What is for Trainer, imported when it is first asked for."""
    if name not in ("attach", "register", "trainer_kwargs"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations import trainer

    globals()[name] = found = getattr(trainer, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
