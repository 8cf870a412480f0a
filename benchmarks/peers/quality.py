"""How good a contender's digits are: against the uncached ones, against the exact solution, and by themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.peers.workload import relative_l2
from benchmarks.schedules import distance
from examples import digits

WORST = 0.05
CLAMP_DB = 150.0  # beyond it two images are equal


def fidelity(images: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR (mean over the digits, and of the worst 5 %) in dB for a data range of 2, relative L2, SSIM."""
    psnr = digits.psnr(images, truth).clamp(max=CLAMP_DB)
    count = math.ceil(WORST * len(psnr))
    return {
        "psnr_db": round(psnr.mean().item(), 3),
        "psnr_db_worst": round(psnr.sort().values[:count].mean().item(), 3),
        "relative_l2": relative_l2(images, truth),
        "ssim": round(ssim(images, truth), 6),
    }


def ssim(images: Tensor, truth: Tensor) -> float:
    """Mean over the digits (N,1,H,W); scikit-image's, windows of 7 x 7."""
    from skimage.metrics import structural_similarity

    pairs = zip(images[:, 0].numpy(), truth[:, 0].numpy(), strict=True)
    return sum(float(structural_similarity(a, b, data_range=2.0)) for a, b in pairs) / len(images)


def quality(images: Tensor, labels: Tensor, uncached: Tensor, converged: Tensor) -> dict[str, object]:
    return {
        "uncached": fidelity(images, uncached),
        "converged": fidelity(images, converged),
        "class_accuracy": round(digits.accuracy(images, labels), 4),
        "frechet": round(distance(images, uncached), 5) if len(images) > 1 else math.nan,
        "finite": bool(torch.isfinite(images).all()),
    }
