"""Reads from a call's inputs what the clock needs: timestep, latent change, and which conditioning it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from moeca_compile.graph.content import Contents
from moeca_compile.graph.nowait import needs_device_sync
from moeca_compile.runtime.clock import CallObservation

_NO_TIMESTEP = (
    "no timestep input was found in the graph, so steps can't be told apart: every call is computed in full. "
    "Wrap the sampling loop in moeca_compile.trajectory(model, steps, stream=...)"
)
_PER_ROW = "the timesteps differ within the batch: computed in full, nothing kept. Use one timestep a call to cache"


class Probe:
    """One for each trajectory: it remembers latents and the conditioning that it has seen, as copies."""

    def __init__(self) -> None:
        self.latents: dict[Hashable, torch.Tensor] = {}  # the last of each kind of call, the latest call's last
        self.contents = Contents()

    def start(self, kind: Hashable, condition: Hashable) -> None:
        """A trajectory starts with this call: forget those before."""
        self.latents = {kind: self.latents[kind]} if kind in self.latents else {}
        self.contents.keep(condition if isinstance(condition, tuple) else ())

    def look(self, timestep: Any, latent: Any, condition: Sequence[Any], kind: Hashable = 0) -> CallObservation:
        """One host read for all numbers. `timestep`, `latent`: tensors or None; `condition`: tensors or numbers."""
        if timestep is None:
            return CallObservation(None, trouble=_NO_TIMESTEP, kind=kind)
        times = timestep.detach().reshape(-1).double()
        numbers = [times.amin(), times.amax()]
        before = self.latents.pop(kind, None)
        if before is None and self.latents:
            before = next(reversed(self.latents.values()))
        if before is not None and latent is not None:
            numbers.append(_change(latent.detach(), before))
        asked = {i: self.contents.ask(one) for i, one in enumerate(condition) if needs_device_sync(one)}
        flags = [flag for _, same in asked.values() for flag in same]
        read = iter(torch.stack([n.to(times.device, torch.float64) for n in (*numbers, *flags)]).tolist())
        low, high, *jump = [next(read) for _ in numbers]
        if latent is not None:
            self.latents[kind] = latent.detach().clone()
        if low != high:  # NaN too
            return CallObservation(None, trouble=_PER_ROW, kind=kind)
        answers = {i: (kept, [next(read) for _ in same]) for i, (kept, same) in asked.items()}
        seen = tuple(self._content(one, answers.get(i)) for i, one in enumerate(condition))
        return CallObservation(low, seen, jump[0] if jump else 0.0, kind=kind)

    def _content(self, value: Any, answer: tuple[Any, Sequence[float]] | None) -> Hashable:
        """Equal for equal contents; a number by itself."""
        if isinstance(value, torch.Tensor):
            return self.contents.number(value) if answer is None else self.contents.answer(value, *answer)
        given: Hashable = value
        return given


def _change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The largest relative change of a sample, ||now - before|| / ||before||: one exchanged sample is another batch.
    Latents of two dimensions may be tokens without a batch, and are taken as one sample. Of batches of two sizes the
    samples that both have are compared; -1 for latents that can't be compared."""
    if now.shape != before.shape or now.device != before.device:
        if now.dim() < 3 or now.shape[1:] != before.shape[1:] or now.device != before.device:
            return torch.full((), -1.0, device=now.device)
        both = min(len(now), len(before))
        now, before = now[:both], before[:both]
    samples = (now.shape[0], -1) if now.dim() > 2 and now.numel() else (1, -1)
    now, before = now.float().reshape(samples), before.float().reshape(samples)
    change: torch.Tensor = (now - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)
    return change.amax()
