"""Warnings of one compiled handle, or of one session: each cause is shown once and then counted. No torch here.

Python's own filter shows a text once for each process and place, so that a second model with the same problem would
stay silent.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

from moeca_compile.errors import MoecaWarning

_PACKAGE = str(Path(__file__).parents[1])
_TORCH = f"{Path('/torch/')}"


class Warned:
    """The warnings that one handle, or session, has shown.

    Attributes:
        counts: by the text that was shown, how often its cause came up.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def once(self, text: str, cause: str = "") -> None:
        """Warn the first time that a cause comes up; later only count it.

        Args:
            text: the warning.
            cause: identifies the warning; default: the text without its digits.
        """
        cause = cause or "".join(letter for letter in text if not letter.isdigit())
        with self._lock:
            shown = self._texts.setdefault(cause, text)
            self.counts[shown] += 1
            if self.counts[shown] > 1:
                return
        frame = _caller_outside(sys._getframe(1))
        warnings.warn_explicit(
            text, MoecaWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals["__name__"]
        )

    def clear(self) -> None:
        """Forget all causes: each is shown again."""
        with self._lock:
            self.counts.clear()
            self._texts.clear()


def _caller_outside(frame: FrameType) -> FrameType:
    """The nearest frame outside this package and torch: the call of the model."""
    while frame.f_back is not None and (_PACKAGE in frame.f_code.co_filename or _TORCH in frame.f_code.co_filename):
        frame = frame.f_back
    return frame
