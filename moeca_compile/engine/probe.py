"""Reads what the clock needs from a call's inputs: timestep, change of the latent, and contents of the conditioning."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.linalg import vector_norm

from moeca_compile.engine.trajectories.timesteps import (
    EPS,
    NOT_A_NUMBER,
    UP_AND_DOWN,
    StepKey,
    VariedTimesteps,
    read_several,
)
from moeca_compile.graph.content import Contents, needs_device_sync
from moeca_compile.runtime.clock import CallObservation

FEW = 256  # timesteps of a call
_NO_TIMESTEP = (
    "no timestep input was found in the graph, so steps can't be told apart: every call is computed in full. "
    "Wrap the sampling loop in moeca_compile.trajectory(model, steps, stream=...)"
)


class Probe:
    """Reads the inputs of one trajectory's calls. It keeps copies of latents and conditioning to compare with.

    Attributes:
        latents: the last latent of each kind of call, the latest call's last.
        times: the last timesteps of each kind of call: one, or all as a tensor.
        contents: numbers the contents of tensors.
    """

    def __init__(self) -> None:
        self.latents: dict[Hashable, torch.Tensor] = {}
        self.times: dict[Hashable, torch.Tensor | float] = {}
        self.contents = Contents()

    def start(self, kind: Hashable, condition: Hashable) -> None:
        """Begin a trajectory with the last observed call: drop the copies of earlier calls."""
        self.latents = {kind: self.latents[kind]} if kind in self.latents else {}
        self.times = {kind: self.times[kind]} if kind in self.times else {}
        self.contents.keep(condition if isinstance(condition, tuple) else ())

    def observe(
        self, timestep: Any, latent: Any, condition: Sequence[Any], kind: Hashable = 0, more: Sequence[Any] = ()
    ) -> CallObservation:
        """Observe a call, with one host read for all numbers; a second one for several timesteps.

        Args:
            timestep: a tensor of any shape; None: the graph has no timestep input.
            latent: a tensor; None: not known.
            condition: tensors or numbers.
            kind: identifies the input signature.
            more: tensors, the timestep inputs beside `timestep`.
        """
        if timestep is None:
            return CallObservation(None, trouble=_NO_TIMESTEP, kind=kind)
        before = self.latents.pop(kind, None)
        if before is None and self.latents:
            before = next(reversed(self.latents.values()))
        has_change = before is not None and latent is not None
        numbers = [] if before is None or latent is None else [_change(latent.detach(), before)]
        on_device = []  # contents on an accelerator are compared there, and the answers are read with the numbers
        for i, value in enumerate(condition):
            if needs_device_sync(value):
                copies, same = self.contents.ask(value)
                on_device.append((i, value, copies, same))
                numbers += same
        only, answers = _read(timestep.detach(), numbers)
        if latent is not None:
            self.latents[kind] = latent.detach().clone()
        last_times, several = self.times.get(kind), None
        if more or math.isnan(only) or isinstance(last_times, torch.Tensor):
            several = read_several((timestep, *more), latent, last_times)
            if math.isnan(several.position):
                return CallObservation(None, trouble=NOT_A_NUMBER, kind=kind)
        self.times[kind] = only if several is None else several.values
        # a refused call, above, numbers no contents: they would push out those of the trajectory
        identities: list[Any] = list(condition)
        for i, value in enumerate(condition):
            if isinstance(value, torch.Tensor) and not needs_device_sync(value):
                identities[i] = self.contents.number(value)
        position = int(has_change)
        for i, value, copies, same in on_device:
            identities[i] = self.contents.answer(value, copies, answers[position : position + len(same)])
            position += len(same)
        jump, eps = answers[0] if has_change else 0.0, EPS.get(timestep.dtype, 0.0)
        if several is None:
            return CallObservation(only, tuple(identities), jump, kind=kind, eps=eps)
        trouble = UP_AND_DOWN if several.moves_both_ways else ""
        key: StepKey | None = several.uniform
        if key is None:
            key = VariedTimesteps(tuple(map(self.contents.number, (timestep, *more))))
        return CallObservation(
            several.timestep, tuple(identities), jump, trouble, kind, eps, several.position, key, several.by_sample
        )


def _read(timesteps: torch.Tensor, numbers: Sequence[torch.Tensor]) -> tuple[float, list[float]]:
    """The one timestep of a call, NaN where there are several; and the numbers, with one wait for an accelerator."""
    if timesteps.numel() > FEW or needs_device_sync(timesteps):
        low, high, *answers = _to_host((*timesteps.aminmax(), *numbers))
        return low if low == high else math.nan, answers
    values = timesteps.reshape(-1).tolist()  # sooner than tensors are reduced
    return float(values[0]) if values.count(values[0]) == len(values) else math.nan, _to_host(numbers)


def _to_host(numbers: Sequence[torch.Tensor]) -> list[float]:
    if len(numbers) < 2:
        return [number.item() for number in numbers]
    device = numbers[0].device
    return torch.stack([number.to(device, torch.float64) for number in numbers]).tolist()


def _change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The largest relative change of a sample, ||now - before|| / ||before||, a scalar.

    The largest counts, because a batch with one exchanged sample is another batch. A latent of two dimensions may be
    tokens without a batch, and is taken as one sample. For batches of two sizes the first samples of both are compared.
    -1: the latents can't be compared.
    """
    if now.shape != before.shape or now.device != before.device:
        if now.dim() < 3 or now.shape[1:] != before.shape[1:] or now.device != before.device:
            return torch.full((), -1.0, device=now.device)
        shared = min(len(now), len(before))
        now, before = now[:shared], before[:shared]
    samples = (now.shape[0], -1) if now.dim() > 2 and now.numel() else (1, -1)
    now, before = now.float().reshape(samples), before.float().reshape(samples)
    change: torch.Tensor = vector_norm(now - before, dim=1).div_(vector_norm(before, dim=1).clamp_min_(1e-12))
    return change.amax()
