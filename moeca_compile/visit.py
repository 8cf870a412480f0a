"""Looking at what a call would run, in place of running it: for `warmup`, `explain` and the planner's own runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Visitor = Callable[[Any, Sequence[Any], Any], tuple[Any, ...]]  # the entry, the call's arguments, their bank

_local = threading.local()


@contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """In this thread, hand every call of a graph to `visitor`."""
    _local.visitor = visitor
    try:
        yield
    finally:
        _local.visitor = None


def visitor() -> Visitor | None:
    """Who visits in this thread."""
    found: Visitor | None = getattr(_local, "visitor", None)
    return found
