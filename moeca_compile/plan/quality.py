"""Decibels of errors. Errors come as one mean square a sample; quality is the mean of the samples' PSNR.

The mean of decibels, and not the decibels of the mean: else the one sample that took another turn decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

CEILING_DB = 150.0  # of float32 rounding; an exact sample is taken for that, so that means stay finite


def psnr(mse: float, data_range: float) -> float:
    """Decibels of a mean squared error against a signal of this range, at most `CEILING_DB`."""
    if mse <= 0:
        return CEILING_DB
    return min(CEILING_DB, 10 * math.log10(data_range**2 / mse))


def mean_psnr(errors: Iterable[Sequence[float]], data_range: float) -> float:
    """Mean PSNR over the samples of all seeds; `errors`: of each seed the samples' mean squares."""
    return fmean(psnr(mse, data_range) for samples in errors for mse in samples)
