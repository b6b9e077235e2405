"""AdaLip: a Lipschitz-adaptive learning rate per layer (Ioannou, Tagaris, Stafylopatis 2023)."""

from .integrations.trainer import attach, register, trainer_kwargs
from .optim import (
    AdaLip,
    AdaLipU,
    AdamLip,
    AdamLipU,
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

__all__ = [
    "AdaLip",
    "AdaLipU",
    "AdamLip",
    "AdamLipU",
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
