"""The branch cache of one MoE layer, in plain torch: K slots a token, keyed by expert id, in the order of the routing.

B samples, N tokens, K branches a token, E experts. What a slot holds is kept as expert id + 1, so that zero is an empty
slot. A routed expert that a slot holds is a hit, another one a transition; ids that a router gives twice are told apart
by their number. All shapes are static and nothing couples the samples of a batch. Traced into the variants by
`fx.inline`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.passes.kept import State, forecast, overdue, refreshed, wide


def matches(ids: Tensor, held: Tensor) -> Tensor:
    """Whether routed branch k is the one in slot j; each pairs at most once.

    Args:
        ids: [B, N, K] int64, routed now.
        held: [B, N, K] int64, expert + 1 by slot, 0 for none.

    Returns:
        bool [B, N, K, K].
    """
    same = (ids + 1)[..., :, None] == held[..., None, :]
    return same & (_number(ids)[..., :, None] == _number(held)[..., None, :])


def priority(
    ids: Tensor,
    gates: Tensor,
    scores: Tensor,
    now: Tensor,
    order: int,
    state: State,
    sensitivity: Tensor | None,
    quota: Tensor | None,
) -> dict[str, Tensor]:
    """How much each branch wants to be computed: transitions first, then by what each weighs.

    A transition weighs its gate; another branch its gate times the drift of its token's router scores since it was
    computed, or times the error that its forecast must have by now; both times the sensitivity of their expert.

    Args:
        ids, gates: [B, N, K]; scores: [B, N, E], the router's.
        now: step + 1; order: of the forecast.
        state: held [B, N, K], and drift [B, N, K] with scores [B, N, E], or error [B, N, K].
        sensitivity: [E], or None: all alike.
        quota: [E] int64, how many branches of an expert may come before all others, or None.

    Returns:
        priority, float32 [B, N, K].
    """
    match = matches(ids, state["held"])
    hit = match.any(-1)
    weight = gates.float().abs() if sensitivity is None else gates.float().abs() * sensitivity[ids]
    if "error" in state:
        due = torch.where(match, overdue(state, now, order)[..., None, :], 0.0).sum(-1)
    else:
        due = torch.where(match, state["drift"][..., None, :], 0.0).sum(-1) + moved(scores, state["scores"])[..., None]
    weight = torch.where(hit, weight * due, weight)
    rank = torch.where(hit, 0.0, 2.0) + weight / (1 + weight)
    return {"priority": rank if quota is None else rank - 4.0 * ~_within(rank, ids, quota)}


def moved(values: Tensor, last: Tensor) -> Tensor:
    """L1 distance of [B, N, E] from those last seen; what isn't finite (a masked expert) counts nothing. [B, N]."""
    return (values.float() - last.float()).abs().nan_to_num(0.0, posinf=0.0).sum(-1)


def settle(
    fresh: Tensor, chosen: Tensor, ids: Tensor, gates: Tensor, scores: Tensor, now: Tensor, order: int, copy: bool,
    state: State,
) -> dict[str, Tensor]:  # fmt: skip
    """What the layer's branches are at this step, from those computed now and the cache.

    A transition that wasn't computed is left out, and the token's other gates are scaled to the same sum: said
    otherwise, it takes their weighted mean. With none left, the token's last routed sum stands for them.

    Args:
        fresh: [B, N, K, D], right where `chosen`.
        chosen: bool [B, N, K], computed now.
        ids, gates: [B, N, K], routed now; scores: [B, N, E].
        now: step + 1, float32 scalar.
        order: of the forecast; `copy` takes the last values as they are.
        state: held, gates [B, N, K], the slots of `kept.slots_of(order)` [B, N, K, ..], and what `priority` reads.

    Returns:
        branches [B, N, K, D], and by name the state after this step, its slots in the order of `ids`.
    """
    own = {name: slot for name, slot in state.items() if name != "scores"}
    kept, hit = _aligned(ids, chosen, own)
    there = hit | chosen
    value = torch.where(chosen[..., None], fresh, forecast(kept, now, 0 if copy else order))
    weight = gates.to(wide(fresh.dtype))
    share = torch.where(there, weight, 0.0)
    mean = (value * share[..., None]).sum(-2) / _safe(share.sum(-1))[..., None]
    last = (value * kept["gates"][..., None]).sum(-2) / _safe(weight.sum(-1))[..., None]
    stand_in = torch.where(there.any(-1)[..., None], mean, last)[..., None, :].to(fresh.dtype)
    after = refreshed(kept, fresh, chosen, hit, now, order)
    after["held"] = torch.where(there, ids + 1, kept["held"])
    after["gates"] = torch.where(there, gates.to(kept["gates"].dtype), kept["gates"])
    if "drift" in state:
        after["drift"] = torch.where(chosen, 0.0, kept["drift"] + moved(scores, state["scores"])[..., None])
        after["scores"] = scores.float()
    return {"branches": torch.where(there[..., None], value, stand_in), **after}


def _aligned(ids: Tensor, chosen: Tensor, state: State) -> tuple[dict[str, Tensor], Tensor]:
    """The slots in the order of the routing: a hit's own slot, and for transitions those of experts that aren't routed
    any more, lowest last gate first, for computed transitions before the others."""
    match = matches(ids, state["held"])
    hit, free = match.any(-1), ~match.any(-2)
    mine, other = state["gates"][..., :, None], state["gates"][..., None, :]
    slots = torch.arange(ids.shape[-1], device=ids.device)
    lower = (other < mine) | ((other == mine) & (slots[None, :] < slots[:, None]))
    turn = (lower & free[..., None, :]).sum(-1)
    first, then = ~hit & chosen, ~hit & ~chosen
    claim = torch.where(first, first.cumsum(-1), first.sum(-1, keepdim=True) + then.cumsum(-1)) - 1
    takes = (~hit)[..., :, None] & free[..., None, :] & (claim[..., :, None] == turn[..., None, :])
    source = (match | takes).int().argmax(-1)

    def in_order(slot: Tensor) -> Tensor:
        index = source if slot.dim() == 3 else source[..., None].expand_as(slot)
        return slot.gather(2, index)

    return {name: in_order(slot) for name, slot in state.items()}, hit


def _within(rank: Tensor, ids: Tensor, quota: Tensor) -> Tensor:
    """Whether a branch is among the first `quota[e]` of its expert e in its sample; all [B, N, K]."""
    flat, expert = rank.flatten(1), ids.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    experts = expert.gather(1, order)
    counts = (experts[..., None] == torch.arange(len(quota), device=ids.device)).cumsum(1)
    place = counts.gather(2, experts[..., None]).squeeze(2)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, place <= quota[experts]).view_as(ids)


def _safe(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total)


def _number(ids: Tensor) -> Tensor:
    """How many equal ids stand before each, along the last axis."""
    slots = torch.arange(ids.shape[-1], device=ids.device)
    return ((ids[..., :, None] == ids[..., None, :]) & (slots[None, :] < slots[:, None])).sum(-1)
