"""A learning rate found from the secant of one batch's slope along the steps taken."""

from .law import Law, Rate
from .optimizer import Secant
from .probe import Probe

__all__ = ["Law", "Probe", "Rate", "Secant"]
