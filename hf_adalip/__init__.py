"""AdaLip: a Lipschitz-adaptive learning rate per layer (Ioannou, Tagaris, Stafylopatis 2023)."""

from .optim import AdaLip, AdaLipU, AdamLip, AdamLipU, Lipschitz, RMSLip, RMSLipU
from .version import __version__

__all__ = [
    "AdaLip",
    "AdaLipU",
    "AdamLip",
    "AdamLipU",
    "Lipschitz",
    "RMSLip",
    "RMSLipU",
    "__version__",
]
