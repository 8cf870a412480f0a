"""Parameters that a rewritten method was proven for one value of: calls with another value run the original code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_COMPARED = (bool, int, float, str)


class Pin(NamedTuple):
    """`place`: of the parameter among the positional ones after self, -1 where it has none."""

    name: str
    place: int
    default: Any
    value: Any

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives the parameter this value."""
        got = args[self.place] if 0 <= self.place < len(args) else kwargs.get(self.name, self.default)
        if isinstance(self.value, _COMPARED):
            return type(got) is type(self.value) and got == self.value
        return got is self.value


def optional(function: Callable[..., Any]) -> Iterator[Pin]:
    """The parameters of a method that have a default, pinned to it."""
    for place, one in enumerate(list(inspect.signature(function).parameters.values())[1:]):
        if one.default is not one.empty:
            yield Pin(one.name, -1 if one.kind is one.KEYWORD_ONLY else place, one.default, one.default)


def fits(pins: tuple[Pin, ...]) -> Callable[[Sequence[Any], Mapping[str, Any]], bool] | None:
    """Whether a call is one that was proven; None: every call is."""
    return (lambda args, kwargs: all(pin.given(args, kwargs) for pin in pins)) if pins else None
