"""`moeca::align` and `moeca::pick`: which slot holds which branch, and which branches to compute. Small index work.

K slots a token, keyed by expert id. What a slot holds is kept as expert id + 1, so that zero is an empty slot. A routed
expert that a slot holds is a hit, another one a transition; ids that a router gives twice are told apart by their
number. All shapes are static, and nothing couples the samples of a batch.

They are operators of their own so that a compiler doesn't repeat this work for each of the D numbers of a branch: their
tensors are [K, K, B N] at most, for B samples of N tokens. The many tokens lie in the last axis and the few slots
before it, so that every comparison runs along memory.
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
    "pick(Tensor ids, Tensor gates, Tensor held, Tensor due, Tensor? taken, Tensor? sensitivity, "
    "Tensor? threshold, Tensor? quota, SymInt count) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def align(ids: Tensor, held: Tensor, gates: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each routed branch the slot that holds it, or the slot that it takes.

    A hit keeps its slot. A transition takes a slot whose expert isn't routed any more, the one with the lowest last
    gate first; computed transitions choose before the others.

    Args:
        ids: experts routed now, int64 [B, N, K].
        held: expert + 1 by slot, int64 [B, N, K]; 0 is an empty slot.
        gates: the last gate of each slot, [B, N, K].
        chosen: whether the routed branch is computed now, bool [B, N, K].

    Returns:
        source int64 [B, N, K], a permutation of each token's slots; hit bool [B, N, K].
    """
    routed, slot, gate, computed = (_slots_first(values) for values in (ids, held, gates, chosen))
    match = _matches(routed, slot)
    hit, free = match.any(1), ~match.any(0)
    mine, other = gate[:, None], gate[None, :]
    lower = (other < mine) | ((other == mine) & _earlier(match))
    turn = (lower & free[None, :]).sum(1)
    first, then = ~hit & computed, ~hit & ~computed
    claim = torch.where(first, first.cumsum(0), first.sum(0) + then.cumsum(0)) - 1
    takes = (~hit)[:, None] & free[None, :] & (claim[:, None] == turn[None, :])
    numbers = torch.arange(len(slot), device=ids.device)[:, None]
    source = torch.where(match | takes, numbers, 0).sum(1)  # one slot a branch
    return _slots_last(source, ids), _slots_last(hit, ids)


def pick(
    ids: Tensor, gates: Tensor, held: Tensor, due: Tensor, taken: Tensor | None, sensitivity: Tensor | None,
    threshold: Tensor | None, quota: Tensor | None, count: int,
) -> Tensor:  # fmt: skip
    """Choose the `count` branches of each sample that are computed.

    Transitions come first, then branches of experts whose drift passed its threshold, then the others; among equals
    the larger weight. A transition weighs its gate, another branch its gate times what is due in its slot; both times
    the sensitivity of their expert.

    Args:
        ids, gates: routed now, int64 and floating point [B, N, K].
        held: expert + 1 by slot, int64 [B, N, K]; 0 is an empty slot.
        due: drift by slot, or the error that a forecast must have by now, float32 [B, N, K].
        taken: tokens whose branches are computed anyway, bool [B, N]; or None.
        sensitivity, threshold: by expert, float32 [E], or None; for an expert's drift see `drift_of`.
        quota: how many branches of an expert may come before all others, int64 [E]; or None.
        count: how many branches of a sample are chosen.

    Returns:
        int64 [B, count], positions in the flat [N * K].
    """
    hit, due_now = _held(ids, held, due)
    weight = gates.float().abs() if sensitivity is None else gates.float().abs() * sensitivity[ids]
    weight = torch.where(hit, weight * due_now, weight)
    rank = torch.where(hit, 0.0, 4.0) + weight / (1 + weight)  # a tier each, 2 apart
    if threshold is not None:
        past = _mean_by_expert(due_now, hit, ids, len(threshold)) >= threshold
        rank = rank + 2.0 * (hit & past.gather(1, ids.flatten(1)).view_as(ids))
    if quota is not None:
        rank = rank - 6.0 * ~_within(rank, ids, quota)
    if taken is not None:
        rank = torch.where(taken[..., None], -9.0, rank)
    return rank.flatten(1).topk(count, dim=1).indices


def drift_of(ids: Tensor, held: Tensor, due: Tensor, experts: int) -> Tensor:
    """Of each expert the mean of what is due over the sample's branches that are routed to it and held; NaN: none.

    Args:
        ids, held, due: as in `pick`.

    Returns:
        float32 [B, experts].
    """
    hit, due_now = _held(ids, held, due)
    return _mean_by_expert(due_now, hit, ids, experts)


def _mean_by_expert(values: Tensor, among: Tensor, ids: Tensor, experts: int) -> Tensor:
    """[B, E] of values [B, N, K], which are 0 where they aren't `among` those that count."""
    total, count = (
        torch.zeros(len(ids), experts, device=ids.device).scatter_add(1, ids.flatten(1), summand.float().flatten(1))
        for summand in (values, among)
    )
    return total / count


def _held(ids: Tensor, held: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    """Of each routed branch whether a slot holds it, and what is due there; both [B, N, K]."""
    match = _matches(_slots_first(ids), _slots_first(held))
    due_now = torch.where(match, _slots_first(due)[None, :], 0.0).sum(1)
    return _slots_last(match.any(1), ids), _slots_last(due_now, ids)


def _slots_first(values: Tensor) -> Tensor:
    """[B, N, K] as [K, B N]."""
    return values.flatten(0, 1).t().contiguous()


def _slots_last(values: Tensor, like: Tensor) -> Tensor:
    """[K, B N] as [B, N, K] again, contiguous: compiled callers count on it."""
    return values.t().contiguous().view(like.shape)


def _matches(routed: Tensor, slot: Tensor) -> Tensor:
    """Whether routed branch k is the one in slot j, [K, K, B N]; each pairs at most once."""
    same = (routed + 1)[:, None] == slot[None, :]
    return same & (_number(routed)[:, None] == _number(slot)[None, :])


def _number(ids: Tensor) -> Tensor:
    """How many equal ids of a token stand before each, [K, B N]."""
    same = ids[:, None] == ids[None, :]
    return (same & _earlier(same)).sum(1)


def _earlier(pairs: Tensor) -> Tensor:
    """[K, K, 1]: whether the second slot comes before the first."""
    slots = torch.arange(pairs.shape[1], device=pairs.device)
    return (slots[None, :] < slots[:, None])[..., None]


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
