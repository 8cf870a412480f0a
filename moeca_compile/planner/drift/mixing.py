"""How a sampler turns what the model gave into its next latent, found by trying: it is the user's code.

Guidance mixes a batch's halves or several calls, a solver scales: of almost every sampler the next latent is linear in
the step's outputs, with one weight for each pair of samples. One run a step, with recorded outputs in the model's place
and a small random change at that step, shows these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.frontend.entry import Entry
from moeca_compile.planner.rollout import Call, Enough, SampledModel

TOLERANCE = 0.05  # of the latent's change that the weights may leave unexplained


@dataclass
class CallRecording:
    """The calls of one uncached run: of each its step, stream and outputs, and the latent that each step began with."""

    steps: list[int] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    timesteps: dict[int, float] = field(default_factory=dict)

    def record(self, call: Call) -> None:
        self.steps.append(call.record.step)
        self.streams.append(call.stream)
        self.outputs.append(tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in call.results))
        if call.latent is not None:
            self.latents.setdefault(call.record.step, call.latent.clone())
        if call.timestep is not None:
            self.timesteps.setdefault(call.record.step, call.timestep)


@dataclass(frozen=True)
class Mixing:
    """weights[step][stream]: [latents, samples of that call] float32; channels: how many of an output's count.

    `found` is False where the sampler isn't linear or its latent wasn't seen: then outputs are compared as they are.
    """

    weights: dict[int, dict[str, torch.Tensor]]
    channels: int | None
    found: bool

    def apply(self, step: int, stream: str, change: torch.Tensor) -> torch.Tensor:
        """What a change [N, ...] of one call's output makes of the latents: [latents, numbers] float32."""
        if self.channels is not None:
            change = change[:, : self.channels]
        weights = self.weights[step][stream]
        return weights @ change.detach().reshape(change.shape[0], -1).to(torch.float32).cpu()


def find_mixing(sampled: SampledModel, seed: int, tape: CallRecording) -> Mixing:
    """Try every step of `seed`, whose uncached run is on the tape."""
    steps = sorted(set(tape.steps))
    weights: dict[int, dict[str, torch.Tensor]] = {}
    rows = _distinct(tape.latents[0]) if 0 in tape.latents else []
    channels = _channels(tape)
    for step in steps[:-1] if channels is not None and len(tape.latents) == len(steps) else []:
        found = _one_step(sampled, seed, tape, step, rows, channels or 0)
        if found is None:
            weights.clear()
            break
        weights[step] = found
    if not weights:
        return Mixing(_plain(tape, steps), None, False)
    weights[steps[-1]] = weights[steps[-2]]  # nobody asks the model after the last step
    return Mixing(weights, channels, True)


def _one_step(
    sampled: SampledModel, seed: int, tape: CallRecording, step: int, rows: Sequence[int], channels: int
) -> dict[str, torch.Tensor] | None:
    calls = [number for number, at in enumerate(tape.steps) if at == step]
    dice = torch.Generator().manual_seed(step)
    changes = {}
    for number in calls:
        output = tape.outputs[number][0]
        noise = torch.randn(output.shape, generator=dice).to(output)
        changes[number] = noise * (0.01 * output.float().std().clamp_min(1e-6)).to(output)
    after = _next_latent(sampled, seed, tape, step, changes)
    if after is None or after.shape != tape.latents[step + 1].shape:
        return None
    moved = (after - tape.latents[step + 1])[rows].flatten(1).double().cpu()
    pushed = torch.cat([change[:, :channels].flatten(1) for change in changes.values()]).double().cpu()
    if moved.shape[1] != pushed.shape[1]:
        return None
    mixed = moved @ torch.linalg.pinv(pushed)
    left = (mixed @ pushed - moved).norm() / moved.norm().clamp_min(1e-30)
    if not bool(left <= TOLERANCE):
        return None
    sizes = [tape.outputs[number][0].shape[0] for number in calls]
    parts = mixed.float().split(sizes, dim=1)
    return {tape.streams[number]: part.contiguous() for number, part in zip(calls, parts, strict=True)}


def _next_latent(
    sampled: SampledModel, seed: int, tape: CallRecording, step: int, changes: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """The latent that the step after `step` begins with when these calls' outputs are changed."""
    seen: list[torch.Tensor] = []
    calls = 0

    def visit(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        nonlocal calls
        number, calls = calls, calls + 1
        if number >= len(tape.steps):
            raise Enough
        if tape.steps[number] == step + 1:
            program, args = entry.place(args, runtime)
            if program.latent is not None:
                seen.append(args[program.latent].clone())
            raise Enough
        first, *others = tape.outputs[number]
        first = first + changes[number] if number in changes else first.clone()
        return (first, *others)

    sampled.replay(seed, visit)
    return seen[0] if seen else None


def _channels(tape: CallRecording) -> int | None:
    """How many of an output's channels are as the latent's: samplers ignore a learned sigma. None: other shapes."""
    if 0 not in tape.latents:
        return None
    latent, output = tape.latents[0].shape, tape.outputs[0][0].shape
    fits = len(latent) == len(output) >= 2 and latent[2:] == output[2:] and output[1] >= latent[1]
    return latent[1] if fits else None


def _distinct(latent: torch.Tensor) -> list[int]:
    """Samples of the batch without repeats: guidance in one call doubles them."""
    flat = latent.flatten(1)
    return [i for i in range(len(flat)) if not any(torch.equal(flat[i], flat[j]) for j in range(i))]


def _plain(tape: CallRecording, steps: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Outputs as they are, the calls of one step summed."""
    size = tape.outputs[0][0].shape[0]
    sizes = {stream: one[0].shape[0] for stream, one in zip(tape.streams, tape.outputs, strict=True)}
    each = {stream: torch.eye(size, count) for stream, count in sizes.items()}
    return dict.fromkeys(steps, each)
