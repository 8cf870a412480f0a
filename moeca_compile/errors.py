"""Every error and warning that leaves this package.

`UserError` and its children mean: the model, the schedule or an option needs changing, and the text says how.
`InvariantError` means: a bug of ours. Catch `MoecaError` for both.
"""

from __future__ import annotations

import sys
import warnings

# Packages that call models, or this one, for the caller: a warning points past their frames.
_BETWEEN = frozenset(("moeca_compile", "torch", "diffusers", "transformers", "accelerate", "contextlib"))


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


def warn(text: str, each_time: bool = False) -> None:
    """Give a `MoecaWarning` that points at the caller's line, not at that of a library in between.

    Args:
        text: the warning.
        each_time: hand it to Python's filters as new. False: they may show a text once for each line.
    """
    frame = sys._getframe(1)
    # code that torch generates has no module's name
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "torch")
    registry = {} if each_time else frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, MoecaWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)
