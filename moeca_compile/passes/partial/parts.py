"""What the rewrites of regions that are recomputed in part share: which tokens a block recomputes, and its helpers.

The regions of one block share their tokens: the attention chooses them when the block is entered, the experts take the
same, so that no branch rests on a residual stream of another age.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.regions import Divisible, Region
from moeca_compile.graph.variant import KEYS, Slot
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.partial.branches import branch_priority, l1_change
from moeca_compile.passes.partial.item_state import State, expected_error, forecast, updated
from moeca_compile.passes.transform.inline import constant, inline
from moeca_compile.passes.transform.ports import Ports
from moeca_compile.schedule import Act, Action, Partial


class Parts:
    """One graph's rewrite in progress. New nodes go before the output; `fx.resort` puts them where they belong."""

    def __init__(self, gm: GraphModule, request: RewriteRequest, ports: Ports) -> None:
        self.gm, self.request, self.ports = gm, request, ports
        self.order = request.order
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.columns = {region.key: column for column, region in enumerate(request.facts.regions)}
        self._chosen: dict[tuple[str, int], Node] = {}

    def info(self, column: int) -> tuple[Region, Divisible]:
        region = self.request.facts.regions.regions[column]
        return region, region.divisible()

    def inline(self, function: Any, **arguments: Any) -> dict[str, Node]:
        with self.gm.graph.inserting_before(fx.output_node(self.gm)):
            return inline(self.gm, function, **arguments)

    def call(self, target: Any, *args: Any) -> Node:
        with self.gm.graph.inserting_before(fx.output_node(self.gm)):
            return fx.call(self.gm, target, args)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if fx.need(node).dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def constant(self, values: tuple[float, ...] | None, dtype: torch.dtype, like: Node) -> Node | None:
        """A table of the control as a part of the graph."""
        if values is None:
            return None
        value = fx.need(like)
        with self.gm.graph.inserting_before(fx.output_node(self.gm)):
            return constant(self.gm, torch.tensor(values, dtype=dtype, device=value.device), value)

    def tables(self, key: str, like: Node, count: int) -> list[Node | None]:
        """The control's sensitivity, threshold (float32 [E]) and quota (int64 [E]) of a region of experts; None: it has
        none, or no branch is computed.

        Args:
            key: of the region.
            like: a node on its device.
            count: how many branches of a sample are computed.
        """
        control, shares = self.request.control, self.request.control.quota.get(key)
        quota = shares and tuple(round(share * count) for share in shares)
        given = (
            (control.sensitivity.get(key), torch.float32), (control.threshold.get(key), torch.float32),
            (quota, torch.int64),
        )  # fmt: skip
        return [self.constant(values, dtype, like) if count else None for values, dtype in given]

    def update_tokens(self, column: int, output: int, fresh: Node | None, chosen: Node | None, copy: bool) -> Node:
        """The value of tokens that age one by one: `fresh` [B, M, D] at `chosen` [B, M], the others forecast; no
        `fresh`: all forecast. What was computed is written. Returns [B, N, D]."""
        state = self.ports.of(column, output)
        item_states = {name: slot for name, slot in state.items() if name not in KEYS}
        entering = self._entering(column) if Slot.ENTERED in item_states else None
        after = self.inline(
            updated_tokens, fresh=fresh, chosen=chosen, entering=entering, now=self.ports.now(), order=self.order,
            copy=copy, state=item_states,
        )  # fmt: skip
        value = after.pop("value")
        if fresh is not None:
            for name, node in after.items():
                self.ports.write(column, output, Slot(name), node)
        return value

    def chosen(self, column: int, rho: float, scores: Node | None = None) -> Node:
        """Positions [B, M] of the tokens that this block recomputes, in ascending order.

        `scores`: the router's [B, N, E], for an experts region.
        """
        region, info = self.info(column)
        count = Partial(rho).tokens(info.tokens)
        block = block_of(region.key)
        if (block, count) not in self._chosen:
            entry_state = self.ports.of(column, 0) if info.enters is not None else None
            experts = next((c for k, c in self.columns.items() if block_of(k) == block and self._has_branches(c)), None)
            branches = None if experts is None else self.ports.of(experts, 0)
            sensitivity = None
            if experts is not None:
                key = self.request.facts.regions.regions[experts].key
                like = self.nodes[region.outputs[0]]
                sensitivity = self.constant(self.request.control.sensitivity.get(key), torch.float32, like)
            choice = self.inline(
                choose, count=count, now=self.ports.now(), order=self.order, entry_state=entry_state, branches=branches,
                entering=self._entering(column) if entry_state is not None and Slot.ENTERED in entry_state else None,
                sensitivity=sensitivity,
                scores=scores if entry_state is None and branches is not None and Slot.SCORES in branches else None,
            )  # fmt: skip
            self._chosen[block, count] = choice["chosen"]
        return self._chosen[block, count]

    def _entering(self, column: int) -> Node | None:
        _, info = self.info(column)
        return None if info.enters is None else self.nodes[info.enters.node]

    def _has_branches(self, column: int) -> bool:
        return self.ports.has(column, 0, Slot.HELD)


def block_of(key: str) -> str:
    """`blocks.3` of `blocks.3.attn`: what lies up to the first number; else the key itself."""
    match = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", key)
    return match[1] if match else key


def computes(act: Act) -> bool:
    """Whether anything of the region's branches is computed."""
    return bool(act.rho or act.tau) if isinstance(act, Partial) else act is Action.COMPUTE


def copies(act: Act) -> bool:
    """Whether what isn't computed is taken as it was, not extrapolated."""
    return act is Action.REUSE


def choose(
    count: int, now: Tensor, order: int, entry_state: State | None, branches: State | None, entering: Tensor | None,
    scores: Tensor | None, sensitivity: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The `count` tokens of each sample that most need to be computed: by what their branches weigh times how far the
    block's input drifted, or how wrong their forecast must be.

    Args:
        entry_state: the state [B, N, ..] of the region that the block begins with; None where that is the experts.
        branches: the block's branch state [B, N, K, ..], or None.
        entering: [B, N, D], what enters the block, and scores: [B, N, E], the router's where the block begins with the
            experts: what drift is seen by.
        sensitivity: [E].

    Returns:
        chosen, int64 [B, count], ascending.
    """
    weight: Tensor | float = 1.0
    if branches is not None:
        held = (branches[Slot.HELD] - 1).clamp_min(0)
        weight = branches[Slot.GATES].float().abs() * (1.0 if sensitivity is None else sensitivity[held])
    if entry_state is None:
        assert branches is not None  # an experts region: what chooses there is its own state
        score = (weight * branch_priority(scores, now, order, branches)).sum(-1)
    else:
        if entering is None:
            priority = expected_error(entry_state, now, order)
        else:
            priority = entry_state[Slot.DRIFT] + l1_change(entering, entry_state[Slot.ENTERED])
        score = priority * (weight if isinstance(weight, float) else weight.sum(-1))
    return {"chosen": score.topk(count, dim=1).indices.sort(dim=1).values}


def updated_tokens(
    fresh: Tensor | None, chosen: Tensor | None, entering: Tensor | None, now: Tensor, order: int, copy: bool,
    state: State,
) -> dict[str, Tensor]:  # fmt: skip
    """Tokens at this step, and the state after it.

    Args:
        fresh: [B, M, D] computed at positions `chosen` [B, M]; with `chosen` None all of them [B, N, D]; None: none.
        entering: [B, N, D], what enters the region, where its drift is kept.
    """
    value = forecast(state, now, 0 if copy else order)
    if fresh is None:
        return {"value": value}
    if chosen is None:
        picked, full = torch.ones_like(state[Slot.AT], dtype=torch.bool), fresh
    else:
        picked = torch.zeros_like(state[Slot.AT], dtype=torch.bool).scatter(1, chosen, True)
        full = value.scatter(1, chosen[..., None].expand_as(fresh), fresh)
    after = updated(state, full, picked, state[Slot.AT] > 0, now, order)
    if entering is not None:
        after[Slot.DRIFT] = torch.where(picked, 0.0, state[Slot.DRIFT] + l1_change(entering, state[Slot.ENTERED]))
        after[Slot.ENTERED] = entering
    return {"value": full, **after}
