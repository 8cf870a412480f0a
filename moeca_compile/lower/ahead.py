"""What Inductor asks of the C++ compiler before its first kernel, asked while the model is still being captured.

Which vector instructions there are takes a compilation and a new process, 3 to 5 seconds of waiting. The answer is kept
by Inductor, so that whoever asks second has it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress


@functools.cache
def ask_compiler() -> threading.Thread:
    """Ask in the background, once a process."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401  here: imports want one thread

    asking = threading.Thread(target=_quietly, args=(cpu_vec_isa.pick_vec_isa,), name="moeca asks g++", daemon=True)
    asking.start()
    return asking


def _quietly(ask: Callable[[], object]) -> None:
    with suppress(Exception):  # Inductor asks again, and says what is wrong
        ask()
