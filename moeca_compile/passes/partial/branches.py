"""The branch cache of one MoE layer, in plain torch: K slots a token, kept in the order of the routing.

B samples, N tokens, K branches a token, E experts, D channels. Which slot is whose is `branch_ops.align`'s work; what
becomes of the values is here. Traced into the variants by `inline`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.graph.variant import Slot
from moeca_compile.ops import branch_slots as branch_ops  # noqa: F401  (makes torch.ops.moeca.align)
from moeca_compile.passes.partial.item_state import State, expected_error, forecast, updated, wide


def l1_change(values: Tensor, last: Tensor) -> Tensor:
    """L1 distance of [B, N, E] from those last seen; what isn't finite (a masked expert) counts nothing. [B, N]."""
    return (values.float() - last.float()).abs().nan_to_num(0.0, posinf=0.0).sum(-1)


def branch_priority(scores: Tensor | None, now: Tensor, order: int, state: State) -> Tensor:
    """How much each slot wants to be computed, by its token's router scores [B, N, E] or by its forecast's error."""
    if Slot.ERROR in state:
        return expected_error(state, now, order)
    if scores is None:
        return state[Slot.DRIFT]
    return state[Slot.DRIFT] + l1_change(scores, state[Slot.SCORES])[..., None]


def updated_branches(
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
        state: held, gates [B, N, K], the slots of `item_slots(order)` [B, N, K, ..], and what
            `branch_priority` reads.

    Returns:
        branches [B, N, K, D], and by name the state after this step, its slots in the order of `ids`.
    """
    source, hit = torch.ops.moeca.align(ids, state[Slot.HELD], state[Slot.GATES], chosen)
    aligned = {name: _in_order(slot, source) for name, slot in state.items() if name is not Slot.SCORES}
    available = hit | chosen
    value = torch.where(chosen[..., None], fresh, forecast(aligned, now, 0 if copy else order))
    weight = gates.to(wide(fresh.dtype))
    share = torch.where(available, weight, 0.0)
    mean = (value * share[..., None]).sum(-2) / _safe(share.sum(-1))[..., None]
    last_sum = (value * aligned[Slot.GATES][..., None]).sum(-2) / _safe(weight.sum(-1))[..., None]
    stand_in = torch.where(available.any(-1)[..., None], mean, last_sum)[..., None, :].to(fresh.dtype)
    after = updated(aligned, fresh, chosen, hit, now, order)
    after[Slot.HELD] = torch.where(available, ids + 1, aligned[Slot.HELD])
    after[Slot.GATES] = torch.where(available, gates.to(aligned[Slot.GATES].dtype), aligned[Slot.GATES])
    if Slot.DRIFT in state:
        drift = aligned[Slot.DRIFT] + l1_change(scores, state[Slot.SCORES])[..., None]
        after[Slot.DRIFT] = torch.where(chosen, 0.0, drift)
        after[Slot.SCORES] = scores.float()
    return {"branches": torch.where(available[..., None], value, stand_in), **after}


def _in_order(slot: Tensor, source: Tensor) -> Tensor:
    return slot.gather(2, source if slot.dim() == 3 else source[..., None].expand_as(slot))


def _safe(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total)
