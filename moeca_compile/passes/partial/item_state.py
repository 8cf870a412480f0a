"""Values that age one by one, in plain torch: what is kept of each token or branch, forecast, updated and scored.

Everything is stamped with step + 1, so that zeros mean "never" and an empty state needs no other initial value. The
forecast is Newton's polynomial (see `insert_state`) with the divided differences kept for each item, for they differ in
age: y + d1 (s - s0) + d2 (s - s0)(s - s1). These functions are traced into the variants by `inline`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moeca_compile.graph.variant import Slot

State = Mapping[str, Tensor]  # by `Slot`


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: bfloat16 differences of neighbouring steps would cancel."""
    return torch.promote_types(dtype, torch.float32)


def forecast(state: State, now: Tensor, order: int) -> Tensor:
    """The kept values at `now`.

    Args:
        state: y [.., D] and, by order, d1, d2 [.., D] in at least float32, at and before [..] float32.
        now: step + 1, float32 scalar.
        order: 0 copies.

    Returns:
        [.., D] in the dtype of y.
    """
    y = state[Slot.Y]
    if order == 0:
        return y
    ahead = (now - state[Slot.AT])[..., None]
    total = y + state[Slot.D1] * ahead
    if order == 2:
        total = total + state[Slot.D2] * (ahead * (now - state[Slot.BEFORE])[..., None])
    return total.to(y.dtype)


def updated(state: State, fresh: Tensor, chosen: Tensor, is_same: Tensor, now: Tensor, order: int) -> dict[str, Tensor]:
    """The state after some items were computed.

    Args:
        state: as in `forecast`, and `error` [..] if that is kept.
        fresh: [.., D], the new values where `chosen`; anything else elsewhere.
        chosen: bool [..], computed now.
        is_same: bool [..], whether the kept item is an older value of the same thing.
        now, order: as in `forecast`.
    """
    pick, y, has_value = chosen[..., None], state[Slot.Y], is_same[..., None]
    after: dict[str, Tensor] = {Slot.Y: torch.where(pick, fresh, y), Slot.AT: torch.where(chosen, now, state[Slot.AT])}
    if Slot.ERROR in state:
        expected = torch.where(has_value, forecast(state, now, order), 0.0)
        error = (fresh - expected).abs().mean(-1).float()
        after[Slot.ERROR] = torch.where(chosen, error, state[Slot.ERROR])
    if order == 0:
        return after
    since = torch.where(is_same, now - state[Slot.AT], 1.0)
    slope = torch.where(has_value, (fresh.to(state[Slot.D1].dtype) - y) / since[..., None], 0.0)
    after[Slot.D1] = torch.where(pick, slope, state[Slot.D1])
    if order == 2:
        has_two = is_same & (state[Slot.BEFORE] > 0)
        span = torch.where(has_two, now - state[Slot.BEFORE], 1.0)
        bend = torch.where(has_two[..., None], (slope - state[Slot.D1]) / span[..., None], 0.0)
        after[Slot.D2] = torch.where(pick, bend, state[Slot.D2])
        after[Slot.BEFORE] = torch.where(chosen, torch.where(is_same, state[Slot.AT], 0.0), state[Slot.BEFORE])
    return after


def expected_error(state: State, now: Tensor, order: int) -> Tensor:
    """How wrong a forecast may be by now: its last error, times its age by the order's power. [..] float32."""
    age = now - state[Slot.AT]
    return state[Slot.ERROR] * (age if order == 0 else age * age)
