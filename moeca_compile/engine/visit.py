"""Looking at what a call would run, in place of running it: for `warmup`, `explain` and the planner's own runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Visitor = Callable[[Any, Sequence[Any], Any], tuple[Any, ...]]  # entry, arguments, the handle's runtime

# innermost last, each with the compile context of the handle that it visits (None: any)
_visits: ContextVar[tuple[tuple[object, Visitor], ...]] = ContextVar("moeca_visits", default=())


@contextmanager
def visiting(visitor: Visitor, context: object = None) -> Iterator[None]:
    """In this thread (or task), hand every call of this handle's graphs to `visitor`, but for what another one visits
    inside."""
    before = _visits.get()
    _visits.set((*before, (context, visitor)))
    try:
        yield
    finally:
        _visits.set(before)


def visitor(context: object = None) -> Visitor | None:
    """Who visits this handle (None: any) in this thread or task."""
    visits = _visits.get()
    if not visits:
        return None
    return next((one for whose, one in reversed(visits) if context is None or whose in (None, context)), None)
