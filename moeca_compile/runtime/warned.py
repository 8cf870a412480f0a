"""Warnings of one compiled handle, or of one session: each cause once, counted from then on. No torch here.

Python's own filter shows a text once a process and place, so that the second model that runs into it would be silent.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

from moeca_compile.errors import MoecaWarning

_OURS = str(Path(__file__).parents[1])
_TORCH = f"{Path('/torch/')}"


class Warned:
    """What the user of one handle, or session, was told.

    Attributes:
        counts: how often each cause came up, by the text that was shown.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def once(self, text: str, cause: str = "") -> None:
        """Warn, if it is the first time for this cause (default: the text, whatever numbers are in it)."""
        cause = cause or "".join(letter for letter in text if not letter.isdigit())
        with self._lock:
            shown = self._texts.setdefault(cause, text)
            self.counts[shown] += 1
            if self.counts[shown] > 1:
                return
        frame = _callers(sys._getframe(1))
        warnings.warn_explicit(
            text, MoecaWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals["__name__"]
        )

    def clear(self) -> None:
        """Forget all: each cause is told again."""
        with self._lock:
            self.counts.clear()
            self._texts.clear()


def _callers(frame: FrameType) -> FrameType:
    """The nearest code that is neither ours nor torch's: the call of the model."""
    here = frame
    while here.f_back is not None and (_OURS in here.f_code.co_filename or _TORCH in here.f_code.co_filename):
        here = here.f_back
    return here
