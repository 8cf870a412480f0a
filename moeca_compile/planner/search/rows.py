"""Plans, and what their letters mean for the regions of one graph.

A plan is a letter a step and a predictor. A letter names a kind of row: `C` computes every region, `F` forecasts all of
them; between them are the partial rows of `ROW_TYPES`, each a sensible part of the regions. To add one is to add an
entry there: what it costs is counted on its program, and whether it wins is decided by rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.schedule import Act, Action, Partial, Row, Schedule

FULL, NONE = "C", "F"
Cells = tuple[Act | None, ...]  # a row before it has an order; None: kept, by copy or forecast


@dataclass(frozen=True)
class RowType:
    """A kind of partial row.

    Attributes:
        letter: of it in plans.
        says: what it does, for people.
        does: (a region's kind, its layer, the number of layers) -> the action; None: its kept outputs serve. The
            estimate takes whatever isn't kept to be right (`planner/search/drift.py`).
    """

    letter: str
    says: str
    does: Callable[[str, int, int], Act | None]


def _computes(test: Callable[[str, int, int], bool]) -> Callable[[str, int, int], Act | None]:
    return lambda kind, layer, depth: Action.COMPUTE if test(kind, layer, depth) else None


def _third(layer: int, depth: int) -> int:
    return 3 * layer // depth


ROW_TYPES = (
    # a small share of a DiT-MoE's work, and much of a forecast's error
    RowType("A", "attention only", _computes(lambda kind, layer, depth: kind == "attention")),
    RowType("X", "all but attention", _computes(lambda kind, layer, depth: kind != "attention")),
    # spans of the layers: thirds, for each finer part would have to be measured apart
    RowType("H", "first third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 0)),
    RowType("M", "middle third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 1)),
    RowType("T", "last third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 2)),
    RowType("E", "first and last third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) != 1)),
)
PARTIAL = {one.letter: one for one in ROW_TYPES}


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


Kinds = Mapping[str, Cells]  # letter -> what its row does with each column


def row_kinds(kinds: Sequence[str], layers: Sequence[int]) -> dict[str, Cells]:
    """The row kinds of a graph, given each region's kind and layer. Those that say nothing new are left out."""
    depth = 1 + max(layers, default=0)
    found: dict[str, Cells] = {FULL: (Action.COMPUTE,) * len(kinds), NONE: (None,) * len(kinds)}
    for one in ROW_TYPES:
        cells = tuple(one.does(kind, layer, depth) for kind, layer in zip(kinds, layers, strict=True))
        if cells not in found.values():
            found[one.letter] = cells
    return found


def filled(kinds: Kinds, cheap: Row) -> dict[str, Cells]:
    """The row kinds where a region that isn't computed does what it does in the row `cheap`, if that is PARTIAL."""
    parts = [act if isinstance(act, Partial) else None for act in cheap]
    return {
        letter: tuple(part if act is None else act for act, part in zip(cells, parts, strict=True))
        for letter, cells in kinds.items()
    }


def atoms_of(kinds: Kinds, letters: str) -> tuple[tuple[int, ...], ...]:
    """The columns in groups that every one of these letters treats alike."""
    groups: dict[Cells, list[int]] = {}
    for column in range(len(kinds[FULL])):
        groups.setdefault(tuple(kinds[letter][column] for letter in letters), []).append(column)
    return tuple(map(tuple, groups.values()))


def row_of(cells: Cells, order: int) -> Row:
    """The actions of one row kind."""
    kept = Action.FORECAST if order else Action.REUSE
    return tuple(kept if action is None else action for action in cells)


def schedule_of(plan: Plan, keys: Sequence[str], kinds: Kinds, made_by: str = "") -> Schedule:
    """The plan as a schedule with exactly its rows."""
    order = PREDICTORS[plan.predictor].order
    return Schedule(
        rows=tuple(row_of(kinds[letter], order) for letter in plan.letters),
        regions=tuple(keys),
        order=order if plan.caches else 0,
        made_by=made_by,
    )


def uniform_letters(steps: int, interval: int, warmup: int) -> str:
    """What `Schedule.uniform` computes."""
    return "".join(FULL if s < warmup or (s - warmup + 1) % interval == 0 else NONE for s in range(steps))
