"""The warning of a module that has moved; this module imports none of ours."""

import warnings


def moved(old: str, new: str) -> None:
    """Warns whoever imports the module `old`, which calls this, that its place is `new` now."""
    message = f"{old} is deprecated: import from {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
