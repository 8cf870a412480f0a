"""Distances between samples and the truth: PSNR, and what installed packages give: SSIM, LPIPS."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moeca_compile.errors import OptionError
from moeca_compile.planner.search.quality import psnr

SSIM_WINDOW = 7  # pixels of scikit-image's window; smaller images have no SSIM
Metric = Callable[[Tensor, Tensor], Any]  # samples and truth [N, ...] -> N numbers, or one


class Metrics:
    """The metrics of one comparison.

    Args:
        data_range: of the samples.
        low: the least value of the samples.
        own: the caller's metrics, by name.

    Attributes:
        notes: which metrics were left out, and why.
    """

    def __init__(self, data_range: float, low: float, own: Mapping[str, Metric]) -> None:
        self._range, self._low, self._own = data_range, low, own
        self._lpips: Any = None
        self.notes: dict[str, str] = {}

    def of(self, samples: Tensor, truth: Tensor) -> dict[str, tuple[float, ...]]:
        """Every metric that can be had, one value for each sample.

        Args:
            samples, truth: [N, ...] float32.

        Raises:
            OptionError: a metric of the caller's gave another number of values.
        """
        errors = (samples.double() - truth.double()).square().flatten(1).mean(1).tolist()
        values = {"psnr_db": tuple(psnr(error, self._range) for error in errors)}
        for name, metric in (("ssim", self._ssim), ("lpips", self._lpips_distance)):
            try:
                measured = metric(samples, truth)
            except ImportError as error:
                self.notes[name] = f"{name} is left out: {error}"
                continue
            except (RuntimeError, ValueError, OSError) as error:
                self.notes[name] = f"{name} is left out: {' '.join(str(error).split())[:200]}"
                continue
            if measured is not None:
                values[name] = measured
        for name, own in self._own.items():
            values[name] = _values_of(name, own(samples, truth), len(samples))
        return values

    def _ssim(self, samples: Tensor, truth: Tensor) -> tuple[float, ...] | None:
        """Mean structural similarity of each sample's frames, by scikit-image. None: the samples are no images.
        Source: Wang et al., Image Quality Assessment, IEEE Trans. Image Process. 13 (2004)."""
        if samples.dim() not in (4, 5) or min(samples.shape[-2:]) < SSIM_WINDOW:
            return None
        try:
            structural_similarity: Any = importlib.import_module("skimage.metrics").structural_similarity
        except ImportError:
            raise ImportError("pip install scikit-image") from None
        values = []
        for sample, wanted in zip(_frames(samples), _frames(truth), strict=True):
            similarities = [
                structural_similarity(a.numpy(), b.numpy(), data_range=self._range, channel_axis=0)
                for a, b in zip(sample, wanted, strict=True)
            ]
            values.append(float(sum(similarities) / len(similarities)))
        return tuple(values)

    def _lpips_distance(self, samples: Tensor, truth: Tensor) -> tuple[float, ...] | None:
        """Mean LPIPS distance (AlexNet) of each sample's frames, by the package lpips. None: the samples are no images
        of one or three channels. Source: Zhang et al., arXiv 1801.03924."""
        if samples.dim() not in (4, 5) or samples.shape[-3] not in (1, 3):
            return None
        try:
            lpips = importlib.import_module("lpips")
        except ImportError:
            raise ImportError("pip install lpips") from None
        if self._lpips is None:
            self._lpips = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
        values = []
        for sample, wanted in zip(_frames(samples), _frames(truth), strict=True):
            distance = self._lpips(self._unit_rgb(sample), self._unit_rgb(wanted), normalize=True)
            values.append(float(distance.mean()))
        return tuple(values)

    def _unit_rgb(self, frames: Tensor) -> Tensor:
        """Frames [F, 1 or 3, H, W] as [F, 3, H, W] in [0, 1]."""
        scaled = ((frames - self._low) / self._range).clamp(0, 1)
        return scaled.expand(-1, 3, -1, -1)


def _frames(samples: Tensor) -> Tensor:
    """[N, C, H, W] or [N, F, C, H, W] as [N, F, C, H, W]."""
    return samples.unsqueeze(1) if samples.dim() == 4 else samples


def _values_of(name: str, value: Any, count: int) -> tuple[float, ...]:
    values = torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()
    if len(values) not in (1, count):
        raise OptionError(f"compare: the metric {name!r} gave {len(values)} values for {count} samples; give one each")
    return tuple(values)
