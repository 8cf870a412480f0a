"""The solvers of diffusers for flows, on given noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.equal.multistep import Guided

Sample = Callable[[Guided, Tensor], Tensor]
Sampler = Callable[[Sequence[float], int], Sample]  # noise levels before each step, and an order

NEARLY_NOISE = 1e-6  # the log signal-to-noise ratio of pure noise is infinite; UniPC's own distance from it


def unipc(sigmas: Sequence[float], order: int) -> Sample:
    from diffusers import UniPCMultistepScheduler

    return _with(UniPCMultistepScheduler, sigmas, {"solver_order": order})


def dpm(sigmas: Sequence[float], order: int) -> Sample:
    """DPM-Solver++, multistep."""
    from diffusers import DPMSolverMultistepScheduler

    return _with(DPMSolverMultistepScheduler, sigmas, {"solver_order": order, "algorithm_type": "dpmsolver++"})


def _with(scheduler_type: Any, sigmas: Sequence[float], options: dict[str, Any]) -> Sample:
    def sample(guided: Guided, x: Tensor) -> Tensor:
        scheduler = scheduler_type(prediction_type="flow_prediction", use_flow_sigmas=True, **options)
        scheduler.set_timesteps(len(sigmas))
        levels = torch.tensor([min(sigmas[0], 1 - NEARLY_NOISE), *sigmas[1:], 0.0])
        scheduler.sigmas, scheduler.timesteps = levels, 1000 * levels[:-1]
        scheduler.set_begin_index(0)
        for time, sigma in zip(scheduler.timesteps, sigmas, strict=True):
            x = scheduler.step(guided(x, sigma)[0], time, x, return_dict=False)[0]
        return x

    return sample
