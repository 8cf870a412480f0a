"""Passes of one's own: `moeca_compile.passes.register(fn, stage="rewrite", after="drop_dead")`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from moeca_compile.errors import OptionError

Pass = TypeVar("Pass", bound=Callable[..., Any])

STAGES = ("normalize", "find", "rewrite")
_registered: dict[str, list[tuple[Callable[..., Any], str]]] = {stage: [] for stage in STAGES}


def register(one: Pass, stage: str, after: str = "") -> Pass:
    """Run a pass of your own in all models that are compiled or explained from now on.

    Args:
        one: `(gm, facts: Facts) -> GraphModule`, for the stage "find" `-> Facts`, for the stage "rewrite"
            `(gm, request: RewriteRequest) -> GraphModule` (`passes/facts.py`). It may change `gm`, which is a copy. Its
            name is that of the function.
        stage: "normalize" (the captured graph), "find" (its facts) or "rewrite" (each variant).
        after: the name of the pass that it runs after; "" puts it first in its stage, but for `materialize_casts`:
            every pass sees the conversions that autocast makes.

    Returns:
        `one`, unchanged.

    Raises:
        OptionError: an unknown stage, something that can't be called, or a name that is taken. An unknown `after` is
            told when a model is compiled.
    """
    if stage not in STAGES:
        raise OptionError(f"register: stage={stage!r} is none of {', '.join(STAGES)}")
    name: str = getattr(one, "__name__", "")
    if not name:
        raise OptionError(f"register: expected a function (gm, ctx), and got {type(one).__name__}")
    if any(name == function.__name__ for passes in _registered.values() for function, _ in passes):
        raise OptionError(f"register: a pass {name} is registered already. Take it out first: unregister({name!r})")
    _registered[stage].append((one, after))
    return one


def unregister(name: str) -> None:
    """Take a registered pass out; models that are compiled from now on run without it.

    Args:
        name: the name of the function that was registered.

    Raises:
        OptionError: no pass of this name is registered.
    """
    for passes in _registered.values():
        for entry in passes:
            if entry[0].__name__ == name:
                passes.remove(entry)
                return
    names = [function.__name__ for passes in _registered.values() for function, _ in passes]
    raise OptionError(f"unregister: no pass {name!r} is registered; registered are {names}")


def with_registered(stage: str, passes: Sequence[Pass], first: int = 0) -> tuple[Pass, ...]:
    """The passes of a stage, and those registered for it in their places.

    Args:
        first: the place of those that were registered without `after`.

    Raises:
        OptionError: one is to run after a pass that isn't there, or has the name of one that is.
    """
    ordered: list[Any] = list(passes)
    for function, after in _registered[stage]:
        names = [entry.__name__ for entry in ordered]
        if function.__name__ in names:
            raise OptionError(f"register: stage {stage} has a pass {function.__name__} of its own")
        if after and after not in names:
            raise OptionError(f"register({function.__name__}, after={after!r}): stage {stage} has {', '.join(names)}")
        ordered.insert(names.index(after) + 1 if after else first, function)
    return tuple(ordered)


def is_registered(name: str) -> bool:
    """Whether it may be left out by the option `disable`."""
    return any(function.__name__ == name for passes in _registered.values() for function, _ in passes)
