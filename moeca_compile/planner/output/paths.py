"""Trajectories as the fit sees them: the latents that the steps began with, and what the model returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.rollout import Call, SampledModel
from moeca_compile.schedule import Schedule

FINER = (2, 4)  # times the steps of the two runs that a converged state is extrapolated from
MAX_ORDER = 3  # of convergence: above it the difference of the runs is mostly rounding


@dataclass
class Path:
    """One trajectory.

    Attributes:
        states: the latents [N, C, ...] float32 that each step began with, and the final samples [N, C, ...].
        outputs: by step that computed the model, what it returned, one tensor [N, C', ...] float32 for each part of
            the guidance: one, or two where guidance takes both halves in one batch or in two calls.
        timesteps: of each step.
        is_batched: guidance takes both halves in one batch.
        finer: of a converged path, the same at every step of the finest run.
        rounding: `finfo.eps` of the latents that the model was called with.
    """

    states: list[Tensor] = field(default_factory=list)
    outputs: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    timesteps: list[float | None] = field(default_factory=list)
    is_batched: bool = False
    finer: Path | None = None
    rounding: float = 0.0

    @property
    def samples(self) -> Tensor:
        """The final samples."""
        return self.states[-1]


class _Recorder:
    """Collects a path from the calls of a run. The calls of one step come with one latent."""

    def __init__(self) -> None:
        self.path = Path()

    def __call__(self, call: Call) -> None:
        step, path = call.record.step, self.path
        if call.latent is None or call.state is None or step not in (len(path.states), len(path.states) - 1):
            raise ScheduleError(
                "calibrate: the output's weights are fitted for samplers that call the model with their latent as a "
                "tensor argument, once a step or once for each part of the guidance. Take both halves of the guidance "
                "in one batch, or use granularity='region'"
            )
        latent = call.latent.detach().float().cpu()
        if not path.states:
            path.is_batched, path.rounding = is_doubled(latent), torch.finfo(call.latent.dtype).eps
        if path.is_batched:
            latent = latent.chunk(2)[0]
        if step == len(path.states):
            path.states.append(latent.clone())
            path.timesteps.append(call.timestep)
        elif not torch.equal(latent, path.states[step]):
            raise ScheduleError(
                f"calibrate: step {step} of the sampler calls the model twice with different latents, so the output's "
                "weights can't be fitted: they are for samplers that call it once a step, or once for each part of the "
                "guidance. Use granularity='region' for this one"
            )
        if call.is_computed:
            output = call.state.tensors[0].detach().float().cpu().clone()
            path.outputs[step] = (*path.outputs.get(step, ()), *output.chunk(1 + path.is_batched))


def record_path(
    sampled: SampledModel, seed: int, schedule: Schedule | None = None, watch: Callable[[Call], None] | None = None
) -> Path:
    """Sample a seed, and keep what the fit needs.

    Args:
        sampled: the compiled model, of granularity `output`.
        seed: passed to the sampler.
        schedule: that the run follows; None: everything is computed.
        watch: is called after each call of the model, too.

    Raises:
        ScheduleError: a step of the sampler calls the model with several latents, no input was found to be the latent,
            or the samples have another shape than the latents.
    """
    recorder = _Recorder()

    def both(call: Call) -> None:
        recorder(call)
        if watch is not None:
            watch(call)

    samples = sampled.run(seed, schedule, watch=both)
    path = recorder.path
    if not path.states or samples.shape != path.states[-1].shape:
        shape = list(path.states[-1].shape) if path.states else "nothing"
        raise ScheduleError(
            f"calibrate: the samples have shape {list(samples.shape)}, the sampler's latents {shape}. To fit the "
            "output's weights, sample(model, seed) must return the last latent"
        )
    path.states.append(samples)
    return path


def converged_path(
    sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], uncached: Path, keep_finer: bool = False
) -> Path:
    """The states that the sampler converges to, at the steps of an uncached path, by Richardson extrapolation.

    The sampler runs with `FINER` times the steps. The order of convergence is measured: the ratio of the differences
    between the three runs' samples. Source: Richardson & Gaunt, The Deferred Approach to the Limit, Phil. Trans. R.
    Soc. A 226 (1927).

    Args:
        sampled: the compiled model.
        seed: passed to the sampler.
        sampler: takes `steps`.
        uncached: the path of `seed` at the sampler's own number of steps.
        keep_finer: also give the path at every step of the finest run.

    Returns:
        The extrapolated states and samples. Its outputs are the finest run's, where that one passes the step's
        timestep; at the other steps `uncached`'s.
    """
    runs = [_of_steps(sampled, seed, sampler, times * len(uncached.timesteps)) for times in FINER]
    coarse, fine = runs
    weight = extrapolation_weight(uncached.samples, coarse.samples, fine.samples)
    path = Path(timesteps=uncached.timesteps)
    for step, time in enumerate(uncached.timesteps):
        before, after = (_state_at(run, time, step / len(uncached.timesteps)) for run in runs)
        path.states.append(after + weight * (after - before))
        finest = FINER[-1] * step
        passes = time is None or math.isclose(number(fine.timesteps[finest]), time, rel_tol=1e-6, abs_tol=1e-9)
        path.outputs[step] = fine.outputs[finest] if passes else uncached.outputs[step]
    path.states.append(fine.samples + weight * (fine.samples - coarse.samples))
    if keep_finer:
        path.finer = Path(outputs=fine.outputs, timesteps=fine.timesteps)
        for step, time in enumerate(fine.timesteps):
            before = _state_at(coarse, time, step / len(fine.timesteps))
            path.finer.states.append(fine.states[step] + weight * (fine.states[step] - before))
        path.finer.states.append(path.samples)
    return path


def extrapolation_weight(uncached: Tensor, coarse: Tensor, fine: Tensor) -> float:
    """w of Richardson's extrapolation fine + w (fine - coarse); the order of convergence is measured.

    Args:
        uncached, coarse, fine: the samples of one seed with 1, 2 and 4 times the steps.
    """
    differences = [float((a - b).norm()) for a, b in ((uncached, coarse), (coarse, fine))]
    ratio = differences[0] / max(differences[1], 1e-30)
    order = min(MAX_ORDER, max(1, round(math.log2(max(ratio, 1e-30)))))
    return 1.0 / (2.0**order - 1.0)


def given_path(uncached: Path, wanted: Tensor) -> Path:
    """An uncached path bent to end at given samples.

    Their distance from the uncached samples is spread over the steps in proportion to how far the latent moves.
    """
    moves = [
        float((after - before).norm()) for before, after in zip(uncached.states, uncached.states[1:], strict=False)
    ]
    total, done = max(sum(moves), 1e-30), 0.0
    states = [uncached.states[0]]
    for move, state in zip(moves, uncached.states[1:], strict=True):
        done += move
        states.append(state + done / total * (wanted - uncached.samples))
    return Path(states, uncached.outputs, uncached.timesteps)


def is_doubled(latent: Tensor) -> bool:
    """Whether the two halves of a batch are one latent, as guidance in one batch makes them."""
    if len(latent) % 2:
        return False
    first, second = latent.chunk(2)
    return torch.equal(first, second)


@contextmanager
def sampling_with(sampled: SampledModel, sampler: Callable[..., Tensor], **keywords: Any) -> Iterator[None]:
    """In this context the sampler gets further keywords. Neither the length of a run nor its time is the study's."""
    plain, counted, timed = sampled.sample, sampled.steps, len(sampled.uncached)
    sampled.sample = lambda model, seed: sampler(model, seed, **keywords)
    try:
        yield
    finally:
        sampled.sample, sampled.steps = plain, counted
        del sampled.uncached[timed:]


def path_with(sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], **keywords: Any) -> Path:
    """As `record_path`, with further keywords of the sampler."""
    with sampling_with(sampled, sampler, **keywords):
        return record_path(sampled, seed)


def _of_steps(sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], steps: int) -> Path:
    """The path of the same sampler with another number of steps."""
    path = path_with(sampled, seed, sampler, steps=steps)
    if len(path.timesteps) != steps:
        raise ScheduleError(
            f"calibrate: truth='converged' asked sample(model, seed, steps={steps}) for {steps} steps, but it made "
            f"{len(path.timesteps)}. It must make as many steps as it is asked for"
        )
    return path


def _state_at(path: Path, time: float | None, place: float) -> Tensor:
    """The latent at a timestep: the parabola through the three nearest steps, exact where a step has that timestep.

    Args:
        path: with at least three steps.
        time: None: the model takes no timestep; the latent is that of the step at the same fraction of the way.
        place: that fraction.
    """
    times = path.timesteps
    if time is None or place == 0:
        return path.states[round(place * len(times))]
    known = [number(each) for each in times]
    nodes = sorted(range(len(known)), key=lambda index: abs(known[index] - time))[:3]
    total = torch.zeros_like(path.states[0])
    for node in nodes:
        others = [known[other] for other in nodes if other != node]
        weight = math.prod((time - other) / (known[node] - other) for other in others)
        total.add_(path.states[node], alpha=weight)
    return total


def number(time: float | None) -> float:
    """A timestep as a number; NaN if it isn't known."""
    return math.nan if time is None else float(time)
