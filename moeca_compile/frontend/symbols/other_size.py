"""Arguments of another size, made up: Dynamo's graph serves them too, so it can be captured at a second size at once.

Which sizes may change, and under which conditions, are Dynamo's symbols and its guards on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from moeca_compile.graph import fx

Sizes = dict[Any, int]  # by torch's symbol

UNITS = (16, 8, 4, 2, 1)  # patches, windows and strides divide sizes: a size is changed by a multiple, if it may be
PRIMES = (7, 11, 13, 17, 19, 23, 3, 5)  # so that no size follows from another one by chance


def other_size(gm: GraphModule, args: Sequence[Any]) -> list[Any] | None:
    """Arguments of a graph with another size wherever it is a symbol of Dynamo's that is free to change.

    Args:
        gm: Dynamo's graph.
        args: like those of a call of it; fake tensors do.

    Returns:
        The arguments, new ones as fake tensors; None: every size is fixed.
    """
    examples = [node.meta.get("example_value") for node in fx.placeholders(gm)]
    found: Sizes = {}
    environment = None
    for example, arg in zip(examples, args, strict=True):
        for size, number in zip(_sizes(example), _sizes(arg), strict=False):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                if size.node.expr.is_symbol:
                    found[size.node.expr] = number
    if environment is None:
        return None
    guards = [guard for one in environment.guards if (guard := environment.replace(one.expr)).free_symbols]
    moved = _moved(found, guards, {symbol: environment.var_to_range.get(symbol) for symbol in found})
    if moved == found:
        return None
    with FakeTensorMode():
        return [_like(example, arg, moved) for example, arg in zip(examples, args, strict=True)]


def _sizes(value: Any) -> Sequence[Any]:
    if isinstance(value, torch.Tensor):
        return [*value.shape, *value.stride()]
    return [value] if isinstance(value, (int, torch.SymInt)) else []


def _moved(found: Sizes, guards: Sequence[Any], ranges: Mapping[Any, Any]) -> Sizes:
    """Other sizes, one after the other, such that all guards hold; a size for which none is found stays as it is."""
    moved = dict(found)
    for i, symbol in enumerate(found):
        if moved[symbol] == found[symbol]:
            sizes = [pair for pair in _candidates(found[symbol], i) if not _follows(symbol, pair[0], found, moved)]
            for trial, beyond in _together(symbol, sizes, found, moved):
                if _holds(trial, moved, guards, ranges) and _holds(beyond, moved, guards, ranges):
                    moved |= trial
                    break
    return moved


def _together(
    symbol: Any, sizes: Sequence[tuple[int, int]], found: Sizes, moved: Sizes
) -> Iterator[tuple[Sizes, Sizes]]:
    """Changes of one size, with those beyond: alone; with an equal one, as two inputs may have an axis in common; with
    all equal ones; with one that may be its product with something else, as tokens are of edges."""
    size = found[symbol]
    equal = [other for other in found if found[other] == size == moved[other] and other != symbol]
    for group in [[symbol], *([symbol, other] for other in equal), *([[symbol, *equal]] if len(equal) > 1 else [])]:
        yield from ((dict.fromkeys(group, new), dict.fromkeys(group, beyond)) for new, beyond in sizes)
    for other in [other for other in found if other not in (symbol, *equal)]:
        for new, beyond in sizes:
            if moved[other] * new % size == moved[other] * beyond % size == 0:
                first, second = ({symbol: one, other: moved[other] * one // size} for one in (new, beyond))
                yield first, second


def _holds(trial: Sizes, moved: Sizes, guards: Sequence[Any], ranges: Mapping[Any, Any]) -> bool:
    if any(ranges[symbol] is not None and size not in ranges[symbol] for symbol, size in trial.items()):
        return False
    sizes = moved | trial
    own = (guard for guard in guards if guard.free_symbols & trial.keys() and guard.free_symbols <= sizes.keys())
    return all(_value(guard, sizes) == True for guard in own)  # noqa: E712 (sympy's true)


def _candidates(size: int, first: int) -> Iterator[tuple[int, int]]:
    """Other sizes, each with one beyond it: at the largest that a model takes, it may leave a slice out. All are at
    least two, as one is broadcast."""
    for unit in UNITS:
        for i in range(len(PRIMES)):
            change = unit * PRIMES[(first + i) % len(PRIMES)]
            yield size + change, size + change + unit
            if size - change - unit > 1:
                yield size - change, size - change - unit


def _follows(symbol: Any, size: int, found: Sizes, moved: Sizes) -> bool:
    """Whether a size would seem to follow from others that change: as a multiple or a half, by an offset, as a sum."""
    before = found[symbol]
    pairs = [(found[other], moved[other]) for other in found if found[other] != moved[other]]
    changes = [another - one for one, another in pairs]
    if any(size * one == another * before for one, another in pairs) or size - before in map(
        sum, combinations(changes, 2)
    ):
        return True
    return _odd(size - before) in map(_odd, changes)


def _odd(change: int) -> int:
    """Without its factors of two."""
    change = abs(change)
    return change // (change & -change)


def _value(expression: Any, sizes: Sizes) -> Any:
    return expression.subs(sizes)


def _like(example: Any, arg: Any, sizes: Sizes) -> Any:
    def number(size: Any) -> int:
        return int(_value(size.node.expr, sizes)) if isinstance(size, torch.SymInt) else size

    if isinstance(example, torch.SymInt):
        return number(example)
    if not any(isinstance(size, torch.SymInt) for size in _sizes(example)):
        return arg
    shape, strides = [*map(number, example.shape)], [*map(number, example.stride())]
    return torch.empty_strided(shape, strides, dtype=arg.dtype, device=arg.device)
