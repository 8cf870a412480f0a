"""Expert branches that are kept where they lie: what `insert_branches` writes out, as one operator on a CPU.

A step then reads each kept branch once and writes what it computed, where the written-out form gives a whole new state.
It is for programs that are compiled and run in this process. The interpreter, other devices and other runtimes run the
written-out form, which is what this one is tested against.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import BranchesInfo, Region
from moeca_compile.graph.variant import Slot
from moeca_compile.ops.branches import BRANCHES, DTYPES, FORECAST, KEEP
from moeca_compile.ops.native_branches import library
from moeca_compile.ops.top_k import TOP_K
from moeca_compile.passes.partial.parts import Parts, computes, copies
from moeca_compile.schedule import Act, Action, Partial

_SLOTS = (Slot.HELD, Slot.GATES, Slot.Y, Slot.AT, Slot.D1, Slot.D2, Slot.BEFORE, Slot.ERROR, Slot.DRIFT, Slot.SCORES)


def can_change_in_place(parts: Parts, experts: Node) -> bool:
    """Whether the operator takes this row and these branches. Rows with chosen tokens read the state elsewhere too."""
    x, value = fx.need(fx.arg(experts, 0)), fx.need(experts)
    chooses_tokens = any(isinstance(act, Partial) and act.rho for act in parts.request.row)
    right_kind = value.device.type == "cpu" and value.dtype in DTYPES and x.dtype == value.dtype
    return parts.request.in_place and right_kind and not chooses_tokens and library() is not None


def insert_in_place(
    parts: Parts, region: Region, info: BranchesInfo, act: Act, column: int, routing: dict[str, Node],
    state: dict[Slot, Node],
) -> None:  # fmt: skip
    """Write the operator for one region.

    Args:
        parts: the rewrite in progress.
        region: of experts, column `column` of the schedule.
        info: its branches.
        act: what the row does with it.
        routing: ids, gates [B, N, K] and scores [B, N, E] of this step.
        state: the region's slots.
    """
    experts = parts.nodes[info.value.node]
    gates = parts.cast(routing["gates"], torch.float32)
    scores = parts.cast(routing["scores"], torch.float32) if Slot.SCORES in state else None
    slots = [state.get(slot) for slot in _SLOTS]
    ids, now, order = routing["ids"], parts.ports.now(), parts.order
    read = (ids, gates, scores, now, *slots)
    total = parts.nodes[info.total]
    if act is not Action.COMPUTE:
        _choose_by_rank(parts, fx.arg(experts, 1))
    if not computes(act):
        given = (ids, gates, now, *slots[:7], order, copies(act), fx.need(experts).dtype)
        _stand_in(parts, total, parts.call(FORECAST, *given))
        return
    parts.ports.change(column, 0, state)
    if act is Action.COMPUTE:
        parts.call(KEEP, parts.call(aten.reshape.default, experts, list(info.value.shape)), *read, order)
        return
    assert isinstance(act, Partial)
    x, _, *weights = experts.args
    count = act.branches(info.value.shape[1] * info.value.shape[2])
    tables = parts.tables(region.key, experts, count)
    _stand_in(parts, total, parts.call(BRANCHES, x, *read, *tables, *weights, count, order, copies(act)))


def _stand_in(parts: Parts, total: Node, routed: Node) -> None:
    """Let the operator's sum stand for the graph's."""
    shaped = parts.call(aten.reshape.default, routed, list(fx.shape(total)))
    total.replace_all_uses_with(parts.cast(shaped, fx.need(total).dtype))


def _choose_by_rank(parts: Parts, ids: Node) -> None:
    """Let `moeca::top_k` stand for the `topk` of a router that chose `ids`: in these rows sorting is a large part."""
    topk = fx.strip(ids, lambda node: node.target in fx.VIEWS or node.target is operator.getitem)
    if topk.target is not aten.topk.default:
        return
    given = fx.arguments_of(topk)
    scores = fx.need(given["self"])
    of_the_last_axis = given.get("dim", -1) in (-1, scores.dim() - 1) and given.get("largest", True)
    if scores.dtype == torch.float32 and of_the_last_axis:
        topk.replace_all_uses_with(parts.call(TOP_K, given["self"], given["k"]))
