"""How far samples are from the wanted ones: the mean squared error, or a quality function of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.decode import short

QualityFunction = Callable[[torch.Tensor, torch.Tensor], Sequence[float] | torch.Tensor]

WORST_ERROR = 1e30  # a mean squared error whose PSNR is the least one


def errors_of(
    samples: torch.Tensor, wanted: torch.Tensor, quality: QualityFunction | None, data_range: float
) -> list[float]:
    """The error of each sample [samples, ...].

    Args:
        samples, wanted: float32, on the CPU.
        quality: the caller's function; None: the PSNR in dB.
        data_range: of the samples.

    Returns:
        Mean squared errors; for a function, those whose PSNR is what it returned. `WORST_ERROR` for a sample that is
        not finite.

    Raises:
        ScheduleError: the function doesn't return one number a sample.
    """
    if quality is None:
        return squared_errors(samples, wanted)
    values = torch.as_tensor(quality(samples, wanted)).detach().double().cpu()
    if values.shape != (len(rows_of(samples)),) or bool(values.isnan().any()):
        raise ScheduleError(
            f"calibrate: quality(samples, wanted) gave {short(values.tolist())} for samples of shape "
            f"{list(samples.shape)}, expected one number for each of the {len(rows_of(samples))} samples, not NaN"
        )
    is_finite = rows_of(samples).isfinite().all(dim=1).tolist()
    errors = (data_range**2 * 10 ** (-values / 10)).tolist()
    return [min(error, WORST_ERROR) if finite else WORST_ERROR for error, finite in zip(errors, is_finite, strict=True)]


def squared_errors(samples: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """The mean squared error of each sample [samples, ...]; `WORST_ERROR` for a sample that is not finite."""
    errors = rows_of(samples - wanted).square().mean(dim=1).tolist()
    return [error if math.isfinite(error) else WORST_ERROR for error in errors]


def rows_of(samples: torch.Tensor) -> torch.Tensor:
    """[samples, numbers]"""
    return samples.reshape(len(samples), -1) if samples.ndim > 1 else samples.reshape(1, -1)


def name_of(quality: QualityFunction | None) -> str | None:
    """Of a quality function, for the facts of a folder."""
    if quality is None:
        return None
    return f"{getattr(quality, '__module__', '')}.{getattr(quality, '__qualname__', type(quality).__qualname__)}"
