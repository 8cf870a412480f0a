"""Quality: the mean over samples of the PSNR in dB, from one mean squared error per sample.

The mean of the PSNRs is used, not the PSNR of the mean error: otherwise a single diverging sample decides the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

CEILING_DB = 150.0  # about float32 rounding; the PSNR of an exact sample, so that means stay finite
FLOOR_DB = -150.0  # the PSNR of a sample that is not finite


def psnr(mse: float, data_range: float) -> float:
    """10 log10(data_range^2 / mse), in dB, clamped to [`FLOOR_DB`, `CEILING_DB`]."""
    if mse <= 0:
        return CEILING_DB
    ratio = data_range**2 / mse
    return min(CEILING_DB, max(FLOOR_DB, 10 * math.log10(ratio))) if ratio > 0 else FLOOR_DB


def mean_psnr(errors: Iterable[Sequence[float]], data_range: float) -> float:
    """Mean PSNR in dB over the samples of all seeds; `errors`: for each seed the mean squared error of each sample."""
    return fmean(psnr(mse, data_range) for samples in errors for mse in samples)
