"""Plans, and what their letters mean for the regions of one graph.

A plan is one letter per step and a predictor. A letter names a kind of row: `C` computes every region, `F` forecasts
every region, and each partial row of `ROW_TYPES` computes some of the regions. To add a kind of partial row, add an
entry there: its cost is counted on its variant, and rollouts decide whether it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeca_compile.planner.search.predict import PREDICTORS
from moeca_compile.schedule import Act, Action, Partial, Row, Schedule

FULL, NONE = "C", "F"
Cells = tuple[Act | None, ...]  # a row without an order; None: not computed, so reused or forecast


@dataclass(frozen=True)
class RowType:
    """A kind of partial row.

    Attributes:
        letter: in plans.
        description: what the row computes, for people.
        action: (kind of a region, its layer, number of layers) -> the action; None: the region is reused or forecast.
            The estimate assumes that every other action is exact (`planner/search/drift.py`).
    """

    letter: str
    description: str
    action: Callable[[str, int, int], Act | None]


def _computes(test: Callable[[str, int, int], bool]) -> Callable[[str, int, int], Act | None]:
    return lambda kind, layer, depth: Action.COMPUTE if test(kind, layer, depth) else None


def _third(layer: int, depth: int) -> int:
    return 3 * layer // depth


ROW_TYPES = (
    # attention is a small fraction of a DiT-MoE's MACs, and causes much of the error of a forecast
    RowType("A", "attention only", _computes(lambda kind, layer, depth: kind == "attention")),
    RowType("X", "all but attention", _computes(lambda kind, layer, depth: kind != "attention")),
    # thirds of the layers: every finer part would need measurements of its own
    RowType("H", "first third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 0)),
    RowType("M", "middle third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 1)),
    RowType("T", "last third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) == 2)),
    RowType("E", "first and last third of the layers", _computes(lambda kind, layer, depth: _third(layer, depth) != 1)),
)
PARTIAL = {row_type.letter: row_type for row_type in ROW_TYPES}


@dataclass(frozen=True)
class Plan:
    """One letter per step, and the name of the predictor of its forecasts."""

    letters: str
    predictor: str = "order-1"

    def __str__(self) -> str:
        return f"{self.letters} ({self.predictor})"

    @property
    def caches(self) -> bool:
        """Whether some row does not compute everything."""
        return set(self.letters) != {FULL}

    @property
    def partial(self) -> frozenset[str]:
        """The letters of its partial rows."""
        return frozenset(self.letters) - {FULL, NONE}


Kinds = Mapping[str, Cells]  # letter -> the action of its row for each column


def row_kinds(kinds: Sequence[str], layers: Sequence[int]) -> dict[str, Cells]:
    """The row kinds of a graph.

    Args:
        kinds: of each region, as in `Region.kind`.
        layers: the layer of each region.

    Returns:
        The actions of each row kind, by letter. A row kind with the same actions as an earlier one is left out.
    """
    depth = 1 + max(layers, default=0)
    rows: dict[str, Cells] = {FULL: (Action.COMPUTE,) * len(kinds), NONE: (None,) * len(kinds)}
    for row_type in ROW_TYPES:
        cells = tuple(row_type.action(kind, layer, depth) for kind, layer in zip(kinds, layers, strict=True))
        if cells not in rows.values():
            rows[row_type.letter] = cells
    return rows


def with_partial(kinds: Kinds, row: Row) -> dict[str, Cells]:
    """The row kinds in which a region that is not computed takes its action from `row`, if that action is PARTIAL."""
    changed = {}
    for letter, cells in kinds.items():
        pairs = zip(cells, row, strict=True)
        changed[letter] = tuple(act if cell is None and isinstance(act, Partial) else cell for cell, act in pairs)
    return changed


def atoms_of(kinds: Kinds, letters: str) -> tuple[tuple[int, ...], ...]:
    """The columns in groups (atoms) with equal actions in the row kinds `letters`."""
    groups: dict[Cells, list[int]] = {}
    for column in range(len(kinds[FULL])):
        groups.setdefault(tuple(kinds[letter][column] for letter in letters), []).append(column)
    return tuple(map(tuple, groups.values()))


def row_of(cells: Cells, order: int) -> Row:
    """The actions of one row kind with a forecast of this order."""
    cached = Action.FORECAST if order else Action.REUSE
    return tuple(cached if action is None else action for action in cells)


def schedule_of(plan: Plan, keys: Sequence[str], kinds: Kinds, made_by: str = "") -> Schedule:
    """The plan as a schedule, one row per step, over the regions `keys`."""
    order = PREDICTORS[plan.predictor].order
    return Schedule(
        rows=tuple(row_of(kinds[letter], order) for letter in plan.letters),
        regions=tuple(keys),
        order=order if plan.caches else 0,
        made_by=made_by,
    )


def uniform_letters(steps: int, interval: int, warmup: int) -> str:
    """The letters of `Schedule.uniform(interval, warmup)`."""
    return "".join(FULL if s < warmup or (s - warmup + 1) % interval == 0 else NONE for s in range(steps))
