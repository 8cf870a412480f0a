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
            numbers.append(_change(latent.detach().float(), self.last.float()))
        low, high, *jump = torch.stack([n.to(times.device, torch.float64) for n in numbers]).tolist()
        if latent is not None:
            self.last = latent.detach().clone()
        if low != high:  # NaN too
            return Sighting(None, trouble=_PER_ROW)
        return Sighting(low, tuple(self._fingerprint(one) for one in condition), jump[0] if jump else 0.0)

    def _fingerprint(self, value: Hashable) -> Hashable:
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


def _change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The largest relative change of a sample, ||now - before|| / ||before||: one exchanged sample is another batch.
    Latents of two dimensions may be tokens without a batch, and are taken as one sample."""
    samples = (now.shape[0], -1) if now.dim() > 2 and now.numel() else (1, -1)
    now, before = now.reshape(samples), before.reshape(samples)
    change: torch.Tensor = (now - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)
    return change.amax()


def fingerprint(tensor: torch.Tensor) -> Hashable:
    """A hash of a tensor's bytes; on an accelerator a position-weighted sum there, so that only 8 bytes travel."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.device.type == "cpu":
        return tuple(tensor.shape), hash(raw.numpy().tobytes())
    weights = torch.arange(1, raw.numel() + 1, device=raw.device) * 0x9E3779B97F4A7C1 + 1
    return tuple(tensor.shape), int((raw.long() * weights).sum())
