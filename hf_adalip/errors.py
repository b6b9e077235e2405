"""The errors that say something to the user in one line; this module imports nothing."""


class UsageError(ValueError):
    """What is wrong with the arguments, in one line for the user."""


class DataError(ValueError):
    """What is wrong with a dataset, in one line for the user."""


class SaveError(OSError):
    """What could not be written and why, in one line for the user."""


class DivergedError(Exception):
    """A run was finished, and its loss is not finite."""


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The user stopped the run, and it has been saved."""


class ScriptError(ValueError):
    """Why a script or this package cannot be published, in one line for the user."""


class PublishError(ValueError):
    """Why nothing was published, for the user."""
