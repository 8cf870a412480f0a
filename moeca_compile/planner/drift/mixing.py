"""How a sampler computes its next latent from the outputs of the model, found by experiment.

Guidance mixes the halves of a batch or several calls, and a solver scales: in almost every sampler the next latent is
linear in the outputs of a step, with one weight for each pair of samples. To find the weights, the sampler runs once
for each step with the recorded outputs in place of the model and a small random change at that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.frontend.entry import Entry
from moeca_compile.planner.rollout import Call, SampledModel, StopRun

TOLERANCE = 0.05  # the fraction of the latent's change that the weights may leave unexplained


@dataclass
class CallRecording:
    """The calls of one uncached run.

    Attributes:
        steps: of each call.
        streams: the guidance stream of each call.
        outputs: of each call.
        latents: at the start of each step.
        timesteps: of each step.
        changes: steps at which another transformer took over.
    """

    steps: list[int] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    timesteps: dict[int, float] = field(default_factory=dict)
    changes: set[int] = field(default_factory=set)
    _program: object = None

    def record(self, call: Call) -> None:
        """Add one call."""
        if call.program is not self._program and self.steps and call.record.step > self.steps[-1]:
            self.changes.add(call.record.step)
        self._program = call.program
        self.steps.append(call.record.step)
        self.streams.append(call.stream)
        self.outputs.append(
            tuple(output.clone() if isinstance(output, torch.Tensor) else output for output in call.results)
        )
        if call.latent is not None:
            self.latents.setdefault(call.record.step, call.latent.clone())
        if call.timestep is not None:
            self.timesteps.setdefault(call.record.step, call.timestep)


@dataclass(frozen=True)
class Mixing:
    """The weights of a sampler.

    Attributes:
        weights: weights[step][stream] is [latents, samples of that call] float32.
        channels: how many channels of an output the sampler uses; None: all.
        is_linear: False if the sampler is not linear or its latent is unknown; outputs are then compared directly.
    """

    weights: dict[int, dict[str, torch.Tensor]]
    channels: int | None
    is_linear: bool

    def apply(self, step: int, stream: str, change: torch.Tensor) -> torch.Tensor:
        """The change of the latents, [latents, numbers] float32, that follows from a change [N, ...] of an output."""
        if self.channels is not None:
            change = change[:, : self.channels]
        weights = self.weights[step][stream]
        return weights @ change.detach().reshape(change.shape[0], -1).to(torch.float32).cpu()


def find_mixing(sampled: SampledModel, seed: int, recording: CallRecording) -> Mixing:
    """Find the weights of every step.

    Args:
        sampled: the model and its sampler.
        seed: of the run.
        recording: of the uncached run of that seed.

    Returns:
        The weights; `is_linear` says whether they describe the sampler.
    """
    steps = sorted(set(recording.steps))
    weights: dict[int, dict[str, torch.Tensor]] = {}
    rows = _distinct_samples(recording.latents[0]) if 0 in recording.latents else []
    channels = _channels(recording)
    for step in steps[:-1] if channels is not None and len(recording.latents) == len(steps) else []:
        step_weights = _weights_of_step(sampled, seed, recording, step, rows, channels or 0)
        if step_weights is None:
            weights.clear()
            break
        weights[step] = step_weights
    if not weights:
        return Mixing(_identity_weights(recording, steps), None, False)
    weights[steps[-1]] = weights[steps[-2]]  # no call shows the latent after the last step
    return Mixing(weights, channels, True)


def _weights_of_step(
    sampled: SampledModel, seed: int, recording: CallRecording, step: int, rows: Sequence[int], channels: int
) -> dict[str, torch.Tensor] | None:
    """The weights of each stream at one step, by least squares; None: they do not explain the change of the latent.

    rows: the distinct samples of the latent; channels: as in `Mixing`.
    """
    calls = [number for number, call_step in enumerate(recording.steps) if call_step == step]
    generator = torch.Generator().manual_seed(step)
    changes = {}
    for number in calls:
        output = recording.outputs[number][0]
        noise = torch.randn(output.shape, generator=generator).to(output)
        changes[number] = noise * (0.01 * output.float().std().clamp_min(1e-6)).to(output)
    next_latent = _next_latent(sampled, seed, recording, step, changes)
    if next_latent is None or next_latent.shape != recording.latents[step + 1].shape:
        return None
    latent_change = (next_latent - recording.latents[step + 1])[rows].flatten(1).double().cpu()
    output_change = torch.cat([change[:, :channels].flatten(1) for change in changes.values()]).double().cpu()
    if latent_change.shape[1] != output_change.shape[1]:
        return None
    weights = latent_change @ torch.linalg.pinv(output_change)
    residual = (weights @ output_change - latent_change).norm() / latent_change.norm().clamp_min(1e-30)
    if not bool(residual <= TOLERANCE):
        return None
    sizes = [recording.outputs[number][0].shape[0] for number in calls]
    parts = weights.float().split(sizes, dim=1)
    return {recording.streams[number]: part.contiguous() for number, part in zip(calls, parts, strict=True)}


def _next_latent(
    sampled: SampledModel, seed: int, recording: CallRecording, step: int, changes: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """The latent at the start of the next step if the outputs of these calls change; None: there is none."""
    latents: list[torch.Tensor] = []
    calls = 0

    def respond(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        nonlocal calls
        number, calls = calls, calls + 1
        if number >= len(recording.steps):
            raise StopRun
        if recording.steps[number] == step + 1:
            program, args = entry.place(args, runtime)
            if program.latent is not None:
                latents.append(args[program.latent].clone())
            raise StopRun
        first, *others = recording.outputs[number]
        first = first + changes[number] if number in changes else first.clone()
        return (first, *others)

    sampled.replay(seed, respond)
    return latents[0] if latents else None


def _channels(recording: CallRecording) -> int | None:
    """How many channels the latent has: samplers ignore further channels of an output, such as a learned sigma.

    None: the latent and the outputs have different shapes otherwise.
    """
    if 0 not in recording.latents:
        return None
    latent, output = recording.latents[0].shape, recording.outputs[0][0].shape
    matches = len(latent) == len(output) >= 2 and latent[2:] == output[2:] and output[1] >= latent[1]
    return latent[1] if matches else None


def _distinct_samples(latent: torch.Tensor) -> list[int]:
    """The samples of the batch without repeats: guidance in one call doubles them."""
    flat = latent.flatten(1)
    return [i for i in range(len(flat)) if not any(torch.equal(flat[i], flat[j]) for j in range(i))]


def _identity_weights(recording: CallRecording, steps: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Weights that sum the outputs of the calls of one step."""
    size = recording.outputs[0][0].shape[0]
    sizes = {stream: outputs[0].shape[0] for stream, outputs in zip(recording.streams, recording.outputs, strict=True)}
    weights = {stream: torch.eye(size, count) for stream, count in sizes.items()}
    return dict.fromkeys(steps, weights)
