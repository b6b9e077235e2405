"""What is wrong with a training: the checks, what is watched of a step, the doctor's trial."""

from .checks import Finding, WrongOptimizerError, examine, examine_run

__all__ = ["Finding", "WrongOptimizerError", "examine", "examine_run"]
