"""Values that age one by one, in plain torch: what is kept of each token or branch, forecast, refreshed and scored.

Everything is stamped with step + 1, so that zeros mean "never" and an empty state needs no other initial value. The
forecast is Newton's polynomial (see `insert_state`) with the divided differences kept for each item, for they differ in
age: y + d1 (s - s0) + d2 (s - s0)(s - s1). These functions are traced into the variants by `inline`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_VALUE = ("y", "at", "d1", "d2", "before")  # the value and its stamp; first difference; second, and the stamp before


def slots_of(order: int) -> tuple[str, ...]:
    """What is kept of a value for a forecast of this order."""
    return _VALUE[: (2, 3, 5)[order]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: bfloat16 differences of neighbouring steps would cancel."""
    return torch.promote_types(dtype, torch.float32)


def forecast(kept: State, now: Tensor, order: int) -> Tensor:
    """The kept values at `now`.

    Args:
        kept: y [.., D] and, by order, d1, d2 [.., D] in at least float32, at and before [..] float32.
        now: step + 1, float32 scalar.
        order: 0 copies.

    Returns:
        [.., D] in the dtype of y.
    """
    y = kept["y"]
    if order == 0:
        return y
    ahead = (now - kept["at"])[..., None]
    total = y + kept["d1"] * ahead
    if order == 2:
        total = total + kept["d2"] * (ahead * (now - kept["before"])[..., None])
    return total.to(y.dtype)


def refreshed(kept: State, fresh: Tensor, chosen: Tensor, known: Tensor, now: Tensor, order: int) -> dict[str, Tensor]:
    """The state after some items were computed.

    Args:
        kept: as in `forecast`, and `error` [..] if that is kept.
        fresh: [.., D], the new values where `chosen`; anything else elsewhere.
        chosen: bool [..], computed now.
        known: bool [..], whether the kept item is an older value of the same thing.
        now, order: as in `forecast`.
    """
    pick, y, old = chosen[..., None], kept["y"], known[..., None]
    after = {"y": torch.where(pick, fresh, y), "at": torch.where(chosen, now, kept["at"])}
    if "error" in kept:
        expected = torch.where(old, forecast(kept, now, order), 0.0)
        wrong = (fresh - expected).abs().mean(-1).float()
        after["error"] = torch.where(chosen, wrong, kept["error"])
    if order == 0:
        return after
    since = torch.where(known, now - kept["at"], 1.0)
    slope = torch.where(old, (fresh.to(kept["d1"].dtype) - y) / since[..., None], 0.0)
    after["d1"] = torch.where(pick, slope, kept["d1"])
    if order == 2:
        twice = known & (kept["before"] > 0)
        span = torch.where(twice, now - kept["before"], 1.0)
        bend = torch.where(twice[..., None], (slope - kept["d1"]) / span[..., None], 0.0)
        after["d2"] = torch.where(pick, bend, kept["d2"])
        after["before"] = torch.where(chosen, torch.where(known, kept["at"], 0.0), kept["before"])
    return after


def overdue(kept: State, now: Tensor, order: int) -> Tensor:
    """How wrong a forecast may be by now: its last error, times its age by the order's power. [..] float32."""
    age = now - kept["at"]
    return kept["error"] * (age if order == 0 else age * age)
