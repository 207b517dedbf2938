"""What can go wrong in the lab; each error is a CondmodError and the builtin that it is."""

from condmod import CondmodError, SpecError


class ConfigError(SpecError):
    """A training config is wrong: the file, the field, the rule, what came."""


class RunFolderError(CondmodError, OSError):
    """A run folder cannot be read or written."""


class RunFolderExistsError(RunFolderError, FileExistsError):
    """A run folder exists already, and nothing allows to overwrite it."""


class DivergedError(CondmodError, ArithmeticError):
    """The loss or its gradient is no longer a finite number."""


class OutOfMemoryError(CondmodError, MemoryError):
    """A run is larger than the machine's memory."""


class DataError(CondmodError, ValueError):
    """The images or labels of a run are missing, broken or too few."""
