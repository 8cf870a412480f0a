"""A MoE layer whose branches (token, expert) age one by one: some are computed, the others forecast.

The router runs at every step, for all tokens, and the current gates combine. A PARTIAL row computes all branches of the
block's chosen tokens, and beyond them a fixed number of branches a sample: transitions first, then those that are worst
by now (`branch_ops.pick`). They go through the same operator, one row a branch. Shared experts are kept beside the
branches, token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import BranchesInfo, Divisible, Region
from moeca_compile.graph.variant import Slot
from moeca_compile.passes.partial.branches import branch_priority, updated_branches
from moeca_compile.passes.partial.branches_in_place import can_change_in_place, insert_in_place
from moeca_compile.passes.partial.item_state import State, wide
from moeca_compile.passes.partial.parts import Parts, computes, copies
from moeca_compile.passes.partial.slice_tokens import Slice
from moeca_compile.schedule import Act, Action, Partial


def insert_branches(parts: Parts, mark: fx.Mark) -> None:
    region, info = parts.info(mark.region)
    assert info.branches is not None
    act, column = mark.action, mark.region
    experts = parts.nodes[info.branches.value.node]
    routing = _routing(parts, info, info.branches, experts)
    state = parts.ports.of(column, 0)
    if can_change_in_place(parts, experts):
        insert_in_place(parts, region, info.branches, act, column, routing, state)
        _shared_parts(parts, info, act, column, None)
        return
    dtypes, value = {slot: fx.need(node).dtype for slot, node in state.items()}, fx.need(experts).dtype
    for slot, dtype in ((Slot.Y, value), (Slot.D1, wide(value)), (Slot.D2, wide(value))):
        if slot in state:
            state[slot] = parts.cast(state[slot], dtype)
    chosen = parts.chosen(column, act.rho, routing["scores"]) if isinstance(act, Partial) and act.rho else None
    if act is Action.COMPUTE:
        fresh = parts.inline(_compute_all, experts=experts, shape=info.branches.value.shape)
    elif computes(act):
        assert isinstance(act, Partial)
        fresh = _compute_chosen(parts, region, info, act, routing, state, chosen)
    else:
        fresh = parts.inline(_compute_none, state=state)
    users = list(experts.users)
    after = parts.inline(
        updated_branches, **fresh, **routing, now=parts.ports.now(), order=parts.order, copy=copies(act), state=state
    )
    branches = after.pop("branches")
    if computes(act):
        for name, node in after.items():
            parts.ports.write(column, 0, Slot(name), parts.cast(node, dtypes[Slot(name)]))
    if act is not Action.COMPUTE:
        flat = parts.call(aten.reshape.default, branches, list(fx.shape(experts)))
        for user in users:
            if user in experts.users:
                user.replace_input_with(experts, flat)
    _shared_parts(parts, info, act, column, chosen)


def _shared_parts(parts: Parts, info: Divisible, act: Act, column: int, chosen: Node | None) -> None:
    for number, part in enumerate(info.parts, 1):
        _shared_part(parts, info, act, column, number, parts.nodes[part.node], chosen)


def _routing(parts: Parts, info: Divisible, branches: BranchesInfo, experts: Node) -> dict[str, Node]:
    """ids, gates [B, N, K] and scores [B, N, E] of this step."""
    nodes = {"ids": fx.arg(experts, 1), "gates": parts.nodes[branches.gates], "scores": parts.nodes[branches.scores]}
    items = [info.batch, info.tokens, -1]
    return {name: parts.call(aten.reshape.default, node, items) for name, node in nodes.items()}


def _compute_all(experts: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"fresh": experts.reshape(shape), "chosen": torch.ones(shape[:-1], dtype=torch.bool, device=experts.device)}


def _compute_none(state: State) -> dict[str, Tensor]:
    return {"fresh": state[Slot.Y], "chosen": torch.zeros_like(state[Slot.HELD], dtype=torch.bool)}


def _compute_chosen(
    parts: Parts, region: Region, info: Divisible, act: Partial, routing: dict[str, Node], state: dict[Slot, Node],
    chosen: Node | None,
) -> dict[str, Node]:  # fmt: skip
    """The branches that this row computes, through the same operator: their values, and which they are."""
    assert info.branches is not None
    experts = parts.nodes[info.branches.value.node]
    x, _, *weights = experts.args
    assert isinstance(x, Node)
    count = act.branches(info.tokens * info.branches.value.shape[2])
    sensitivity, threshold, quota = parts.tables(region.key, experts, count)
    picked = parts.inline(
        _pick,
        **routing,
        x=x,
        now=parts.ports.now(),
        order=parts.order,
        count=count,
        tokens=chosen,
        state=state,
        sensitivity=sensitivity,
        threshold=threshold,
        quota=quota,
    )
    computed = parts.call(experts.target, picked["rows"], picked["experts"], *weights)
    return parts.inline(_spread, computed=computed, positions=picked["positions"], shape=info.branches.value.shape)


def _pick(
    ids: Tensor, gates: Tensor, scores: Tensor, x: Tensor, now: Tensor, order: int, count: int, tokens: Tensor | None,
    state: State, sensitivity: Tensor | None, threshold: Tensor | None, quota: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Which branches to compute, and what the experts operator takes for them.

    Returns:
        positions int64 [B, R] in the flat [N * K] of each sample, rows [B * R, D], experts int64 [B * R, 1].
    """
    batch, length, top_k = ids.shape
    positions = []
    if tokens is not None:
        positions.append((tokens[..., None] * top_k + torch.arange(top_k, device=ids.device)).flatten(1))
    if count:
        token_is_chosen = None
        if tokens is not None:
            token_is_chosen = torch.zeros(batch, length, dtype=torch.bool, device=ids.device).scatter(1, tokens, True)
        priority = branch_priority(scores, now, order, state)
        picked = torch.ops.moeca.pick(
            ids, gates, state[Slot.HELD], priority, token_is_chosen, sensitivity, threshold, quota, count
        )
        positions.append(picked)
    where = torch.cat(positions, dim=1)
    rows = x.reshape(batch, length, -1)
    width = rows.shape[-1]
    return {
        "positions": where,
        "rows": rows.gather(1, (where // top_k)[..., None].expand(-1, -1, width)).reshape(-1, width),
        "experts": ids.flatten(1).gather(1, where).reshape(-1, 1),
    }


def _spread(computed: Tensor, positions: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The computed branches [B * R, 1, D] in their places."""
    batch, length, top_k, width = shape
    rows = computed.reshape(batch, -1, width)
    index = positions[..., None].expand(-1, -1, width)
    fresh = rows.new_zeros(batch, length * top_k, width).scatter(1, index, rows)
    chosen = torch.zeros(batch, length * top_k, dtype=torch.bool, device=computed.device).scatter(1, positions, True)
    return {"fresh": fresh.view(shape), "chosen": chosen.view(shape[:-1])}


def _shared_part(
    parts: Parts, info: Divisible, act: Act, column: int, output: int, node: Node,
    chosen: Node | None,
) -> None:  # fmt: skip
    """A shared part: computed, or recomputed for the block's chosen tokens, or forecast."""
    sizes = list(info.parts[output - 1].shape)
    if act is Action.COMPUTE or (isinstance(act, Partial) and act.shared):
        parts.update_tokens(column, output, parts.call(aten.reshape.default, node, sizes), None, False)
        return
    fresh = None
    if chosen is not None:
        with parts.gm.graph.inserting_before(fx.output_node(parts.gm)):
            part = Slice(parts.gm, info, chosen)
            part.follow([parts.nodes[name] for name in info.body])
        fresh = parts.call(aten.reshape.default, part.made[node], [sizes[0], -1, sizes[2]])
    users = list(node.users)
    value = parts.update_tokens(column, output, fresh, chosen, copies(act))
    shaped = parts.call(aten.reshape.default, value, list(fx.shape(node)))
    for user in users:
        user.replace_input_with(node, shaped)
