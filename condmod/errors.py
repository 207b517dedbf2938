"""The one error tree. Every error is also the builtin that it is, so `except ValueError` works."""


class CondmodError(Exception):
    """Root of every error that condmod raises on purpose."""


class SpecError(CondmodError, ValueError):
    """A spec or an option is wrong; the text shows the place with a caret."""


class UnknownNameError(SpecError, LookupError):
    """No installed component has this name."""


class SiteError(CondmodError, ValueError):
    """A component does not fit the place it was asked to fill."""


class ShapeError(CondmodError, ValueError):
    """Features, condition or modulation have shapes or dtypes that do not fit."""


class ConditionError(CondmodError, ValueError):
    """A condition's content is wrong: missing or surplus keys, a label out of range, a mask."""


class DefinitionError(CondmodError, TypeError):
    """A component class breaks the contract; raised while the class is defined."""


class PluginError(CondmodError, ImportError):
    """An installed plugin failed; the text names the distribution and the reason."""


class PluginConflictError(PluginError):
    """Two distributions claim the same name."""


class CheckpointError(CondmodError, ValueError):
    """A checkpoint is truncated, foreign, or does not fit the module."""


class CodecError(CondmodError, ValueError):
    """Parameters are not in the published layout that they were said to be in."""


class FoldError(CondmodError, ValueError):
    """A condition cannot be written into the weights exactly."""


class BackendError(CondmodError, RuntimeError):
    """A backend of the passes is not known, or cannot run here."""


def told(error: BaseException) -> str:
    """An exception in one line, type first, as an error about a plugin tells it."""
    words = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    return words.removesuffix(": ")
