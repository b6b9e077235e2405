"""The optimizers. This package imports torch and nothing else."""

from .estimator import Estimator
from .optimizer import LipOptimizer
from .release import GradientRelease, release_gradients
from .secant import Secant
from .step import LayerRate, LayerwiseOptimizer
from .variants import AdaLip, AdaLipU, AdamLip, AdamLipU, LionLip, RMSLip, RMSLipU
from .wrapper import Lipschitz

__all__ = [
    "AdaLip",
    "AdaLipU",
    "AdamLip",
    "AdamLipU",
    "Estimator",
    "GradientRelease",
    "LayerRate",
    "LayerwiseOptimizer",
    "LionLip",
    "LipOptimizer",
    "Lipschitz",
    "RMSLip",
    "RMSLipU",
    "Secant",
    "release_gradients",
]
