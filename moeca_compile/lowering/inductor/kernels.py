"""Kernels that g++ compiles while Python lowers the next variant: all are waited for at the end.

Inductor hands the kernels of a graph to g++ and waits until they are there: 6 of the 15 seconds that a full step of 12
blocks takes. But nothing reads them before the graph runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kernels_later() -> Iterator[Callable[[], None]]:
    """Inside, what Inductor compiles may not run yet; gives a function that waits for the kernels of all of it.

    That function raises what g++ was refused for. Other threads go on waiting as they did.
    """
    from torch._inductor.async_compile import AsyncCompile

    here, wait = threading.get_ident(), AsyncCompile.wait
    pending: list[tuple[AsyncCompile, dict[str, Any]]] = []  # the kernels of one module, to be put among its globals

    def later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == here:
            pending.append((self, scope))
        else:
            wait(self, scope)

    def wait_now() -> None:
        while pending:
            wait(*pending.pop(0))

    AsyncCompile.wait = later  # type: ignore[method-assign]
    try:
        yield wait_now
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
