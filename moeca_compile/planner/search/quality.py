"""Decibels of errors. Errors come as one mean square a sample; quality is the mean of the samples' PSNR.

The mean of decibels, and not the decibels of the mean: else the one sample that took another turn decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

CEILING_DB = 150.0  # of float32 rounding; an exact sample is taken for that, so that means stay finite
FLOOR_DB = -150.0  # what a sample that isn't finite is taken for


def psnr(mse: float, data_range: float) -> float:
    """Decibels of a mean squared error against a signal of this range, from `FLOOR_DB` to `CEILING_DB`."""
    if mse <= 0:
        return CEILING_DB
    ratio = data_range**2 / mse
    return min(CEILING_DB, max(FLOOR_DB, 10 * math.log10(ratio))) if ratio > 0 else FLOOR_DB


def mean_psnr(errors: Iterable[Sequence[float]], data_range: float) -> float:
    """Mean PSNR over the samples of all seeds; `errors`: of each seed the samples' mean squares."""
    return fmean(psnr(mse, data_range) for samples in errors for mse in samples)
