"""Reads from a call's inputs what the clock needs: timestep, latent change, a fingerprint of the conditioning."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from moeca_compile.runtime.clock import Sighting

_NO_TIMESTEP = (
    "no timestep input was found in the graph, so steps can't be told apart: every call is computed in full. "
    "Wrap the sampling loop in moeca_compile.trajectory(model, steps, stream=...)"
)
_PER_ROW = "the timesteps differ within the batch: computed in full, nothing kept. Use one timestep a call to cache"


class Probe:
    """One for each track: it remembers the last latent (a copy) and the fingerprints of tensors it has seen."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, Hashable]] = {}

    def look(self, timestep: Any, latent: Any, condition: Sequence[Any]) -> Sighting:
        """One host read for all numbers. `timestep`, `latent`: tensors or None; `condition`: tensors or numbers."""
        if timestep is None:
            return Sighting(None, trouble=_NO_TIMESTEP)
        times = timestep.detach().reshape(-1).double()
        numbers = [times.amin(), times.amax()]
        if self.last is not None and latent is not None:
            before = self.last.detach().float()
            numbers += [(latent.detach().float() - before).norm().double(), before.norm().double()]
        low, high, *change = torch.stack([n.to(times.device) for n in numbers]).tolist()
        if latent is not None:
            self.last = latent.detach().clone()
        if low != high:  # NaN too
            return Sighting(None, trouble=_PER_ROW)
        jump = change[0] / max(change[1], 1e-12) if change else 0.0
        return Sighting(low, tuple(self._fingerprint(one) for one in condition), jump)

    def _fingerprint(self, value: Any) -> Hashable:
        if not isinstance(value, torch.Tensor):
            return value
        version = -1 if value.is_inference() else value._version
        known = self._known.get(id(value))
        if known is not None and known[0]() is value and known[1] == version >= 0:
            earlier: Hashable = known[2]
            return earlier
        found: Hashable = fingerprint(value)
        if len(self._known) > 64:
            self._known.clear()
        self._known[id(value)] = (weakref.ref(value), version, found)
        return found


def fingerprint(tensor: torch.Tensor) -> Hashable:
    """A hash of a tensor's bytes; on an accelerator a position-weighted sum there, so that only 8 bytes travel."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.device.type == "cpu":
        return tuple(tensor.shape), hash(raw.numpy().tobytes())
    weights = torch.arange(1, raw.numel() + 1, device=raw.device) * 0x9E3779B97F4A7C1 + 1
    return tuple(tensor.shape), int((raw.long() * weights).sum())
