"""What a proof's runs hand to a method beside tensors: a proof holds for these values, if they are always the same."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.expert_dispatch.proof.attempt import Entry, Harness, run
from moeca_compile.expert_dispatch.proof.pins import Pin
from moeca_compile.expert_dispatch.proof.probe import isolated

_VALUES = (bool, int, float, str, type(None))


def passed(stand: Harness, entry: Entry, method: str, seeds: Sequence[int] = (1, 2, 3)) -> list[Pin]:
    """The parameters of `method` that got the same number, flag, text or None in all runs, pinned to that."""
    function = inspect.unwrap(getattr(type(stand.module), method))
    signature = inspect.signature(function)
    calls: list[dict[str, Any]] = []

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return function(self, *args, **kwargs)

    for seed in seeds:
        with isolated():
            module = stand.copy()
            module.__dict__[method] = types.MethodType(note, module)
            run(module, entry, entry.arguments(stand, seed, torch.float32))
    found = []
    for place, one in enumerate(list(signature.parameters.values())[1:]):
        values = [call.get(one.name) for call in calls]
        plain = one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY, one.POSITIONAL_ONLY)
        if plain and values and isinstance(values[0], _VALUES) and all(_same(value, values[0]) for value in values):
            found.append(Pin(one.name, -1 if one.kind is one.KEYWORD_ONLY else place, one.default, values[0]))
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
