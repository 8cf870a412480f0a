"""Every error and warning that leaves this package.

`UserError` and its children mean: the model, the schedule or an option needs changing, and the text says how.
`InvariantError` means: a bug of ours. Catch `MoecaError` for both.
"""

from __future__ import annotations


class MoecaError(Exception):
    """Base of all errors of moeca-compile."""


class UserError(MoecaError):
    """Something that the caller can put right; the message says what, where and how."""


class CaptureError(UserError):
    """The model can't be traced into one functional graph, or holds nothing that can be cached."""


class ScheduleError(UserError):
    """A schedule that can't be read, or doesn't fit the graph or the trajectory."""


class OptionError(UserError):
    """An unknown option, or a value that an option doesn't take."""


class LoweringError(UserError):
    """A compiler below us refused a variant."""


class BundleError(UserError):
    """An exported directory that is damaged, too new, or doesn't fit the request."""


class StateError(UserError):
    """A call that would mix or corrupt cached state: concurrent use, grad mode, a closed trajectory."""


class InvariantError(MoecaError):
    """A rule that this package promises to keep was broken: please report it."""


class MoecaWarning(UserWarning):
    """The result is right, but not what was asked for: slower, colder, or mapped from elsewhere."""
