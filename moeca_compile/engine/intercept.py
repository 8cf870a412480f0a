"""Calls of a compiled handle, handed to other code in place of running its graphs: for `warmup`, `explain` and the
planner's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Interceptor = Callable[[Any, Sequence[Any], Any], tuple[Any, ...]]  # entry, arguments, the handle's runtime

# of this thread (or task): the innermost last, each with the compile context of the handle that it is for (None: any)
INTERCEPTORS: ContextVar[tuple[tuple[object, Interceptor], ...]] = ContextVar("moeca_interceptors", default=())


@contextmanager
def intercepting(interceptor: Interceptor, context: object = None) -> Iterator[None]:
    """In this thread (or task), hand every call of this handle's graphs to `interceptor`, but for what another one
    takes inside."""
    before = INTERCEPTORS.get()
    INTERCEPTORS.set((*before, (context, interceptor)))
    try:
        yield
    finally:
        INTERCEPTORS.set(before)


def interceptor_of(context: object) -> Interceptor | None:
    """Who takes this handle's calls in this thread or task."""
    for target, interceptor in reversed(INTERCEPTORS.get()):
        if target is None or target is context:
            return interceptor
    return None
