"""Which autocasts are on. In a traced graph they aren't seen: the dispatcher casts what an operator gets.

The pass `materialize_casts` writes these casts into the graph. From then on a graph is traced, computed and run with
autocast off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

DEVICES = ("cpu", "cuda")

Casts = tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) of each enabled autocast


def ambient_autocast() -> Casts:
    """The autocasts that are on now; part of a call's signature."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def autocast_is(casts: Casts) -> Iterator[None]:
    """Run with exactly these autocasts on."""
    dtypes = dict(casts)
    with ExitStack() as stack:
        for device in DEVICES:
            on = device in dtypes
            if on or torch.is_autocast_enabled(device):
                context = torch.autocast(device, dtype=dtypes.get(device), enabled=on, cache_enabled=False)
                stack.enter_context(context)
        yield


def without_autocast(run: Callable[..., Any], unpack: bool = False) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The ambient casts are in the graph: applied again while it runs, they would change what must not be cast.
    `unpack`: `run` takes its arguments one by one."""

    def runs(args: Sequence[Any]) -> Sequence[Any]:
        if not torch._C._is_any_autocast_enabled():
            return run(*args) if unpack else run(args)  # type: ignore[no-any-return]
        with autocast_is(()):
            return run(*args) if unpack else run(args)  # type: ignore[no-any-return]

    return runs
