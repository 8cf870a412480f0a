"""Reads from a call's inputs what the clock needs: timestep, latent change, and which conditioning it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import methodcaller
from typing import Any

import torch

from moeca_compile.graph.content import Contents, needs_device_sync
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
        moved = before is not None and latent is not None
        if before is not None and latent is not None:
            numbers.append(_change(latent.detach(), before))
        # on the host contents are compared now; on an accelerator that is asked for, and read with the numbers
        seen: list[Any] = list(condition)
        asked = []
        for i, value in enumerate(condition):
            if not isinstance(value, torch.Tensor):
                continue
            if needs_device_sync(value):
                kept, same = self.contents.ask(value)
                asked.append((i, value, kept, same))
                numbers += same
            else:
                seen[i] = self.contents.number(value)
        answers = torch.stack([*map(methodcaller("to", times.device, torch.float64), numbers)]).tolist()
        low, high = answers[:2]
        if latent is not None:
            self.latents[kind] = latent.detach().clone()
        if low != high:  # NaN too
            return CallObservation(None, trouble=_PER_ROW, kind=kind)
        after = 3 if moved else 2
        for i, value, kept, same in asked:
            seen[i] = self.contents.answer(value, kept, answers[after : after + len(same)])
            after += len(same)
        return CallObservation(low, tuple(seen), answers[2] if moved else 0.0, kind=kind)


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
