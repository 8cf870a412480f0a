"""Qualities with their uncertainty: PSNR of each sample, means with a 95 % interval, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

NORMAL = 1.959964  # standard deviations on either side of a mean that hold 95 %; for a hundred samples and more


def psnr(samples: Tensor, truth: Tensor, data_range: float = 2.0) -> list[float]:
    """Peak signal-to-noise ratio of each sample.

    Args:
        samples, truth: [N, ...].
        data_range: of the samples.

    Returns:
        dB, at most 150.
    """
    errors = (samples.double() - truth.double()).square().flatten(1).mean(1).tolist()
    return [min(150.0, 10 * math.log10(data_range**2 / max(error, 1e-30))) for error in errors]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval, by the normal approximation."""
    return statistics.fmean(values), NORMAL * statistics.stdev(values) / math.sqrt(len(values))


def paired(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of ours less others, sample by sample, and half the width of its 95 % interval."""
    return interval([a - b for a, b in zip(ours, others, strict=True)])


def worst(values: Sequence[float], share: float = 0.05) -> float:
    """The mean of the worst `share` of the values."""
    count = max(1, round(share * len(values)))
    return statistics.fmean(sorted(values)[:count])
