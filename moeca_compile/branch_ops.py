"""`moeca::align` and `moeca::pick`: which slot holds which branch, and which branches to compute. Small index work.

K slots a token, keyed by expert id. What a slot holds is kept as expert id + 1, so that zero is an empty slot. A routed
expert that a slot holds is a hit, another one a transition; ids that a router gives twice are told apart by their
number. All shapes are static, and nothing couples the samples of a batch.

They are operators of their own so that a compiler doesn't repeat this work for each of the D numbers of a branch: their
tensors are [B, N, K, K] at most, for B samples of N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("moeca", "FRAGMENT")
_LIBRARY.define(
    "align(Tensor ids, Tensor held, Tensor gates, Tensor chosen) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "pick(Tensor ids, Tensor gates, Tensor held, Tensor due, Tensor? taken, Tensor? sensitivity, Tensor? quota, "
    "SymInt count) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def align(ids: Tensor, held: Tensor, gates: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The slots in the order of the routing: a hit's own slot, and for transitions those of experts that aren't routed
    any more, lowest last gate first, for computed transitions before the others.

    Args:
        ids: [B, N, K] int64, routed now.
        held: [B, N, K] int64, expert + 1 by slot, 0 for none.
        gates: [B, N, K], the last gate of each slot.
        chosen: bool [B, N, K], whether the routed branch is computed now.

    Returns:
        source int64 [B, N, K], a permutation of each token's slots; hit bool [B, N, K].
    """
    match = _matches(ids, held)
    hit, free = match.any(-1), ~match.any(-2)
    mine, other = gates[..., :, None], gates[..., None, :]
    slots = torch.arange(ids.shape[-1], device=ids.device)
    lower = (other < mine) | ((other == mine) & (slots[None, :] < slots[:, None]))
    turn = (lower & free[..., None, :]).sum(-1)
    first, then = ~hit & chosen, ~hit & ~chosen
    claim = torch.where(first, first.cumsum(-1), first.sum(-1, keepdim=True) + then.cumsum(-1)) - 1
    takes = (~hit)[..., :, None] & free[..., None, :] & (claim[..., :, None] == turn[..., None, :])
    return (match | takes).int().argmax(-1), hit


def pick(
    ids: Tensor, gates: Tensor, held: Tensor, due: Tensor, taken: Tensor | None, sensitivity: Tensor | None,
    quota: Tensor | None, count: int,
) -> Tensor:  # fmt: skip
    """The `count` branches of each sample that most want to be computed: transitions first, then by what each weighs.

    A transition weighs its gate, another branch its gate times what is due in its slot; both times the sensitivity of
    their expert.

    Args:
        ids, gates: [B, N, K], routed now; held: as in `align`.
        due: [B, N, K] float32 by slot: drift, or the error that a forecast must have by now.
        taken: bool [B, N], tokens whose branches are computed anyway; or None.
        sensitivity: [E]; quota: int64 [E], how many branches of an expert may come before all others; or None.

    Returns:
        int64 [B, count], positions in the flat [N * K].
    """
    match = _matches(ids, held)
    hit = match.any(-1)
    weight = gates.float().abs() if sensitivity is None else gates.float().abs() * sensitivity[ids]
    weight = torch.where(hit, weight * torch.where(match, due[..., None, :], 0.0).sum(-1), weight)
    rank = torch.where(hit, 0.0, 2.0) + weight / (1 + weight)
    if quota is not None:
        rank = rank - 4.0 * ~_within(rank, ids, quota)
    if taken is not None:
        rank = torch.where(taken[..., None], -9.0, rank)
    return rank.flatten(1).topk(count, dim=1).indices


def _matches(ids: Tensor, held: Tensor) -> Tensor:
    """Whether routed branch k is the one in slot j, [B, N, K, K]; each pairs at most once."""
    same = (ids + 1)[..., :, None] == held[..., None, :]
    return same & (_number(ids)[..., :, None] == _number(held)[..., None, :])


def _number(ids: Tensor) -> Tensor:
    """How many equal ids stand before each, along the last axis."""
    slots = torch.arange(ids.shape[-1], device=ids.device)
    return ((ids[..., :, None] == ids[..., None, :]) & (slots[None, :] < slots[:, None])).sum(-1)


def _within(rank: Tensor, ids: Tensor, quota: Tensor) -> Tensor:
    """Whether a branch is among the first `quota[e]` of its expert e in its sample; all [B, N, K]."""
    flat, expert = rank.flatten(1), ids.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    experts = expert.gather(1, order)
    counts = (experts[..., None] == torch.arange(len(quota), device=ids.device)).cumsum(1)
    place = counts.gather(2, experts[..., None]).squeeze(2)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, place <= quota[experts]).view_as(ids)


def _fake_align(ids: Tensor, held: Tensor, gates: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids), torch.empty_like(ids, dtype=torch.bool)


def _fake_pick(ids: Tensor, gates: Tensor, held: Tensor, due: Tensor, *rest: object) -> Tensor:
    return ids.new_empty((ids.shape[0], rest[-1]))  # type: ignore[arg-type]


_LIBRARY.impl("align", align, "CompositeExplicitAutograd")
_LIBRARY.impl("pick", pick, "CompositeExplicitAutograd")
torch.library.register_fake("moeca::align", _fake_align, lib=_LIBRARY)
torch.library.register_fake("moeca::pick", _fake_pick, lib=_LIBRARY)
