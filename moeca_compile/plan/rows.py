"""Plans, and what their letters mean for the regions of one graph.

A plan is a letter a step and a predictor. A letter names a kind of row: `C` computes every region, `F` forecasts all of
them; between them are partial rows, each a sensible part of the regions:

    A   attention only: a small share of a DiT-MoE's work, and much of a forecast's error
    X   all but attention
    H   the first third of the layers: their inputs are never stale
    T   the last third
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeca_compile.plan.predict import PREDICTORS
from moeca_compile.schedule import Action, Row, Schedule

FULL, NONE = "C", "F"
PARTIAL = {"A": "attention only", "H": "first third of the layers", "X": "all but attention", "T": "last third"}


@dataclass(frozen=True)
class Plan:
    """One letter a step, and the name of the predictor that its forecasts use."""

    letters: str
    predictor: str = "order-1"

    def __str__(self) -> str:
        return f"{self.letters} ({self.predictor})"

    @property
    def caches(self) -> bool:
        return set(self.letters) != {FULL}

    @property
    def partial(self) -> frozenset[str]:
        """The kinds of partial row in it."""
        return frozenset(self.letters) - {FULL, NONE}


Kinds = Mapping[str, tuple[bool, ...]]  # letter -> for each column whether the row computes it


def row_kinds(kinds: Sequence[str], layers: Sequence[int]) -> dict[str, tuple[bool, ...]]:
    """The row kinds of a graph, given each region's kind and layer. Those that say nothing new are left out."""
    depth = 1 + max(layers, default=0)
    tests: dict[str, Callable[[str, int], bool]] = {
        "A": lambda kind, layer: kind == "attention",
        "H": lambda kind, layer: layer < depth / 3,
        "X": lambda kind, layer: kind != "attention",
        "T": lambda kind, layer: layer >= depth - depth / 3,
    }
    found = {FULL: (True,) * len(kinds), NONE: (False,) * len(kinds)}
    for letter, test in tests.items():
        columns = tuple(test(kind, layer) for kind, layer in zip(kinds, layers, strict=True))
        if columns not in found.values():
            found[letter] = columns
    return found


def atoms_of(kinds: Kinds, letters: str) -> tuple[tuple[int, ...], ...]:
    """The columns in groups that every one of these letters computes or forecasts together."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for column in range(len(kinds[FULL])):
        groups.setdefault(tuple(kinds[letter][column] for letter in letters), []).append(column)
    return tuple(map(tuple, groups.values()))


def row_of(computes: Sequence[bool], order: int) -> Row:
    """The actions of one row kind."""
    kept = Action.FORECAST if order else Action.REUSE
    return tuple(Action.COMPUTE if computed else kept for computed in computes)


def schedule_of(plan: Plan, keys: Sequence[str], kinds: Kinds, made_by: str = "") -> Schedule:
    """The plan as a schedule with exactly its rows; its predictor must be one that schedules can run."""
    order = PREDICTORS[plan.predictor].order
    assert order is not None, f"{plan.predictor} is only tried, never returned"
    return Schedule(
        rows=tuple(row_of(kinds[letter], order) for letter in plan.letters),
        regions=tuple(keys),
        order=order if plan.caches else 0,
        made_by=made_by,
    )


def uniform_letters(steps: int, interval: int, warmup: int) -> str:
    """What `Schedule.uniform` computes."""
    return "".join(FULL if s < warmup or (s - warmup + 1) % interval == 0 else NONE for s in range(steps))
