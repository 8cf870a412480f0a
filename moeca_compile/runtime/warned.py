"""Warnings of one compiled handle, or of one session: each cause is shown once and then counted. No torch here.

Python's own filter shows a text once for each process and place, so that a second model with the same problem would
stay silent.
"""

from __future__ import annotations

import threading
from collections import Counter

from moeca_compile.errors import warn


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
        warn(text, each_time=True)

    def clear(self) -> None:
        """Forget all causes: each is shown again."""
        with self._lock:
            self.counts.clear()
            self._texts.clear()
