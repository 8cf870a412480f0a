"""The table of coefficients -> one input for each region that reads it.

Before: a variant that takes the table [regions, 4] and reads numbers of it, flattened.  After: in its place one row an
input, noted in the graph's meta (`arguments_of`). An index into the table would be a constant in the generated code:
then equal blocks give kernels that differ in it, and each is compiled for itself.
Does nothing where no region is forecast as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.schedule.forecast import MAX_KEPT

_ROWS = "moeca_coefficient_rows"


def split_table(gm: GraphModule, variant: Variant) -> GraphModule:
    if not variant.wants_coefficients:
        return gm
    table = fx.placeholders(gm)[-1]
    (flat,) = table.users
    readers: dict[int, list[tuple[int, Node]]] = {}
    for select in flat.users:
        region, age = divmod(int(str(select.args[2])), MAX_KEPT)
        readers.setdefault(region, []).append((age, select))
    for region in sorted(readers):
        with gm.graph.inserting_before(table):
            row = gm.graph.placeholder(f"{table.name}_{region:03d}")
        row.meta["val"] = fx.value(table)[region]
        for age, select in readers[region]:
            select.args = (row, 0, age)
    gm.graph.erase_node(flat)
    gm.graph.erase_node(table)
    gm.meta[_ROWS] = sorted(readers)
    return gm


def arguments_of(gm: GraphModule) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Makes arguments for this graph out of the variant's."""
    rows: list[int] = gm.meta.get(_ROWS, [])

    def split(args: Sequence[Any]) -> Sequence[Any]:
        table = args[-1].unbind(0)
        return [*args[:-1], *(table[region] for region in rows)]

    return split if rows else lambda args: args
