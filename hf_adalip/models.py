"""Deprecated: `hf_adalip.recipe.image.models` has what was here."""

from .deprecated import moved
from .recipe.image.models import CIFAR10Net, CIFAR100Net, MNISTNet, glorot_uniform_

__all__ = ["CIFAR10Net", "CIFAR100Net", "MNISTNet", "glorot_uniform_"]

moved(__name__, "hf_adalip.recipe.image.models")
