"""What a proof's runs hand to a method beside tensors: it holds for these values, if they are always the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moeca_compile.expert_dispatch.proof.candidate import Candidate, Entry, Pin
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import loads

_VALUES = (bool, int, float, str, type(None))


def parameters(function: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, int]]:
    """Each parameter of a method after self, and its place among the positional ones, -1 where it has none."""
    for place, parameter in enumerate(list(inspect.signature(function).parameters.values())[1:]):
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if positional or parameter.kind is parameter.KEYWORD_ONLY:
            yield parameter, place if positional else -1


def pinned(harness: Harness, candidate: Candidate, loop: Loop) -> Candidate:
    """With the arguments that the proof depends on: numbers, flags and Nones that were the same in all of its runs, and
    that the loop reads; of flags of the entry's own method those whose other value the proof doesn't hold for."""
    entry, rewrite = candidate.entry, candidate.rewrite
    read_by_loop = set().union(*map(loads, loop.nest)) if loop.nest else set()
    pins = []
    for pin in _constant(harness, entry, loop.name):
        if type(pin.value) is bool and entry.method == loop.name:
            flipped = replace(entry, flags=tuple({**dict(entry.flags), pin.name: not pin.value}.items()))
            if harness.disagreement(replace(candidate, entry=flipped), seeds=(1, 2, 3)):
                pins.append(pin)
        elif type(pin.value) is bool or pin.name in read_by_loop:
            pins.append(pin)
    return replace(candidate, rewrite=replace(rewrite, pins=tuple(pins)))


def _constant(harness: Harness, entry: Entry, method: str, seeds: Sequence[int] = (1, 2, 3)) -> Iterator[Pin]:
    """The parameters of `method` that got the same number, flag, text or None in all runs, pinned to that."""
    function = inspect.unwrap(getattr(type(harness.module), method))
    signature = inspect.signature(function)
    calls: list[dict[str, Any]] = []

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return function(self, *args, **kwargs)

    for seed in seeds:
        harness.observed(entry, method, note, seed)
    for parameter, place in parameters(function) if calls else ():
        values = [call.get(parameter.name) for call in calls]
        if isinstance(values[0], _VALUES) and all(_same(value, values[0]) for value in values):
            yield Pin(parameter.name, place, parameter.default, values[0])


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
