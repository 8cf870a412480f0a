"""What samples are compared with beside the uncached ones: the converged solution, or samples of the caller's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.errors import OptionError
from moeca_compile.planner.output.paths import FINER, extrapolation_weight
from moeca_compile.planner.output.study import Truth
from moeca_compile.schedule.decode import short
from moeca_compile.schedule.output import CONVERGED, UNCACHED


def check_truth(truth: Any, sampler: Callable[..., Any]) -> None:
    """Refuse a truth that can't be had, before anything is sampled.

    Raises:
        OptionError: an unknown truth, or `converged` with a sampler that doesn't take `steps`.
    """
    if not (isinstance(truth, Mapping) or callable(truth) or truth in (UNCACHED, CONVERGED)):
        raise OptionError(
            f"compare: truth={short(truth)}, expected {UNCACHED!r}, {CONVERGED!r}, a mapping from seeds to samples, or "
            "a function of the seed"
        )
    if truth == CONVERGED and "steps" not in inspect.signature(sampler).parameters:
        raise OptionError(
            "compare: truth='converged' samples with more steps, but sample(model, seed) takes none: give it a keyword "
            "steps, sample(model, seed, steps=50)"
        )


def true_samples(
    truth: Truth, seeds: Sequence[int], uncached: Sequence[Tensor], finer: Callable[[int, int], Tensor]
) -> list[Tensor]:
    """The samples of each seed that a truth other than `uncached` means.

    Args:
        truth: as for `compare`.
        seeds: that were sampled.
        uncached: the uncached samples of each.
        finer: samples a seed, uncached, with a multiple of the steps.

    Raises:
        OptionError: the samples of a seed are missing, or aren't like the uncached ones.
    """
    wanted = []
    for seed, plain in zip(seeds, uncached, strict=True):
        if truth == CONVERGED:
            coarse, fine = (finer(seed, times) for times in FINER)
            wanted.append(fine + extrapolation_weight(plain, coarse, fine) * (fine - coarse))
            continue
        assert not isinstance(truth, str)
        try:
            samples = truth[seed] if isinstance(truth, Mapping) else truth(seed)
        except KeyError:
            raise OptionError(f"compare: truth has no samples for seed {seed}; give them for every seed") from None
        tensor = torch.as_tensor(samples).detach().float().cpu()
        if tensor.shape != plain.shape or not bool(tensor.isfinite().all()):
            raise OptionError(
                f"compare: the samples that truth gives for seed {seed} must be finite, of shape {list(plain.shape)}"
            )
        wanted.append(tensor)
    return wanted
