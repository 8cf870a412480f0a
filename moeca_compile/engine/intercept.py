"""Passes the calls of a compiled handle to other code instead of its graphs: for `warmup`, `explain` and the planner's
rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Interceptor = Callable[[Any, Sequence[Any], Any], tuple[Any, ...]]  # entry, arguments, the handle's runtime

# of this thread (or task), the innermost last; each with the compile context of its handle (None: any handle)
INTERCEPTORS: ContextVar[tuple[tuple[object, Interceptor], ...]] = ContextVar("moeca_interceptors", default=())


@contextmanager
def intercepting(interceptor: Interceptor, context: object = None) -> Iterator[None]:
    """Pass every call of a handle's graphs to `interceptor`, in this thread or task. An interceptor that is installed
    inside the block takes precedence.

    Args:
        interceptor: takes the entry, the graph's arguments and the handle's runtime; returns the graph's outputs.
        context: compile context of the handle; None: any handle.
    """
    before = INTERCEPTORS.get()
    INTERCEPTORS.set((*before, (context, interceptor)))
    try:
        yield
    finally:
        INTERCEPTORS.set(before)


def interceptor_of(context: object) -> Interceptor | None:
    """The interceptor of a handle's calls in this thread or task; None: there is none."""
    for target, interceptor in reversed(INTERCEPTORS.get()):
        if target is None or target is context:
            return interceptor
    return None
