"""What samples are compared with beside the uncached ones: the converged solution, or samples of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moeca_compile.errors import OptionError
from moeca_compile.planner.output.paths import FINER, extrapolation_weight
from moeca_compile.planner.truth import Goal, given_samples
from moeca_compile.schedule.output import CONVERGED


def true_samples(
    goal: Goal, seeds: Sequence[int], uncached: Sequence[Tensor], finer: Callable[[int, int], Tensor]
) -> list[Tensor]:
    """The samples of each seed that a truth other than `uncached` means.

    Args:
        goal: of `compare`, as `read_truth` gives it.
        seeds: that were sampled.
        uncached: the uncached samples of each.
        finer: samples a seed, uncached, with a multiple of the steps.

    Raises:
        OptionError: the samples of a seed aren't like the uncached ones.
    """
    wanted = []
    for seed, plain in zip(seeds, uncached, strict=True):
        if goal == CONVERGED:
            coarse, fine = (finer(seed, times) for times in FINER)
            wanted.append(fine + extrapolation_weight(plain, coarse, fine) * (fine - coarse))
        else:
            wanted.append(given_samples(goal, seed, plain, "compare", OptionError))
    return wanted
