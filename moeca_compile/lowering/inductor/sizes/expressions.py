"""What a number in a graph has to do with the sizes of its inputs, told by the numbers at several sizes.

Two sizes don't determine it: 16 at 4 tokens and 24 at 6 may be 4 * tokens, or 2 * tokens + 2 * edge. The simplest
expression is taken. Nothing relies on it being right: each further size is compared (`shared.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Vector = tuple[int, ...]  # a number at each of several sizes
MOST = 32  # expressions that others are made of
PARTS = (2, 4, 8, 16)  # of a size, in rules with a rest: patches of two, half of them on each side of a middle


@dataclass(frozen=True, slots=True)
class Dim:
    """The size of the argument at a position, along an axis."""

    position: int
    axis: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """`of` * `times` // `over`."""

    of: Expression
    times: int
    over: int


@dataclass(frozen=True, slots=True)
class Plus:
    """`left` + `right`."""

    left: Expression
    right: Expression | int


@dataclass(frozen=True, slots=True)
class Times:
    """`left` * `right`."""

    left: Expression
    right: Expression


Expression = Dim | Scaled | Plus | Times


class Evaluator:
    """Evaluates expressions in whatever has `+`, `*` and `//`: numbers, torch's symbols, nodes of a graph.

    Args:
        size: gives the value of a `Dim`.
    """

    def __init__(self, size: Callable[[Dim], Any]) -> None:
        self._size = size
        self._known: dict[Expression, Any] = {}

    def value(self, expression: Expression) -> Any:
        """The value of an expression; each is made once."""
        if expression not in self._known:
            self._known[expression] = self._evaluated(expression)
        return self._known[expression]

    def _evaluated(self, expression: Expression) -> Any:
        match expression:
            case Dim():
                return self._size(expression)
            case Scaled(of, times, over):
                value = self.value(of) if times == 1 else self.value(of) * times
                return value if over == 1 else value // over
            case Plus(left, right):
                return self.value(left) + (right if isinstance(right, int) else self.value(right))
            case Times(left, right):
                return self.value(left) * self.value(right)


class Finder:
    """Finds expressions. What it found, later ones are made of."""

    def __init__(self) -> None:
        self.dims: list[Dim] = []
        self._known: dict[Vector, Expression] = {}

    def add_dim(self, values: Sequence[int], dim: Dim) -> Expression:
        """The expression of an input's size: of other inputs' sizes if there is one, else a size of its own."""
        found = self.find(values)
        if found is None:
            found = self._known[tuple(values)] = dim
            self.dims.append(dim)
        return found

    def part(self, values: Sequence[int]) -> Expression | None:
        """A part of one of the sizes that decide all others, to or from a number: where a slice of the middle begins
        and ends. Two sizes show such a rule too easily: `find` doesn't try it."""
        for known, of in self._known.items():
            for over in PARTS if isinstance(of, Dim) else ():
                for sign in (1, -1):
                    rest = over * values[0] - sign * known[0]
                    if all(sign * k + rest == over * v for k, v in zip(known, values, strict=True)):
                        return Scaled(Plus(_scaled(of, Fraction(sign)), rest), 1, over)
        return None

    def find(self, values: Sequence[int]) -> Expression | None:
        """An expression with these values; None: there is none that is simple enough."""
        vector = tuple(values)
        if vector in self._known:
            return self._known[vector]
        found = self._ratio(vector) or self._offset(vector) or self._product(vector) or self._sum(vector)
        if found is not None and len(self._known) < MOST:
            self._known[vector] = found
        return found

    def _ratio(self, vector: Vector) -> Expression | None:
        for known, of in self._known.items():
            if (ratio := _ratio(vector, known)) is not None:
                return _scaled(of, ratio)
        return None

    def _offset(self, vector: Vector) -> Expression | None:
        for known, of in self._known.items():
            if (offset := _offset(vector, known)) is not None:
                return Plus(of, offset)
        return None

    def _product(self, vector: Vector) -> Expression | None:
        for left_values, left in self._known.items():
            for right_values, right in self._known.items():
                product = tuple(a * b for a, b in zip(left_values, right_values, strict=True))
                if (ratio := _ratio(vector, product)) is not None:
                    return _scaled(Times(left, right), ratio)
        return None

    def _sum(self, vector: Vector) -> Expression | None:
        for left_values, left in self._known.items():
            for right_values, right in self._known.items():
                total = tuple(a + b for a, b in zip(left_values, right_values, strict=True))
                if (offset := _offset(vector, total)) is not None:
                    return Plus(Plus(left, right), offset) if offset else Plus(left, right)
        return None


def _ratio(vector: Vector, known: Vector) -> Fraction | None:
    """What `known` is to be multiplied with everywhere."""
    if not known[0] or any(a * known[0] != b * vector[0] for a, b in zip(vector, known, strict=True)):
        return None
    return Fraction(vector[0], known[0])


def _offset(vector: Vector, known: Vector) -> int | None:
    offsets = {a - b for a, b in zip(vector, known, strict=True)}
    return offsets.pop() if len(offsets) == 1 else None


def _scaled(of: Expression, ratio: Fraction) -> Expression:
    return of if ratio == 1 else Scaled(of, ratio.numerator, ratio.denominator)
