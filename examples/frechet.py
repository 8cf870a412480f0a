"""The Frechet distance of two sets of features, each seen as a normal distribution, and a judge's features.

|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982; of a classifier's features: Heusel et al. 2017,
arXiv 1706.08500). With a small classifier in the place of Inception its numbers compare with each other only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Judge(Protocol):
    """A classifier that is split in two: its answers are a linear map of its features."""

    def features(self, x: Tensor) -> Tensor: ...


@torch.no_grad()
def features_of(judge: Judge, images: Tensor) -> Tensor:
    """What the judge decides by, averaged over the places of the image where it has places.

    Args:
        judge: in eval mode, on the CPU.
        images: (N,1,H,W).

    Returns:
        (N, features) float64.
    """
    found = torch.cat([judge.features(part) for part in images.float().cpu().split(1024)])
    return found.flatten(2).mean(2).double() if found.dim() > 2 else found.double()


def frechet(a: Tensor, b: Tensor) -> float:
    """The distance, not below zero but for rounding.

    The trace of the root is the sum of the singular values of R1 R2^T, where Ci = Ri^T Ri and Ri is the triangle of a
    QR decomposition of the centered features: no covariance is squared, inverted or has its root taken, so one that
    lacks full rank (few samples, features that are always zero) is no special case.

    Args:
        a: (N, features) float64, at least two.
        b: (M, features) float64, at least two.
    """
    means, triangles = [], []
    for features in (a, b):
        means.append(features.mean(0))
        centered = (features - means[-1]) / (len(features) - 1) ** 0.5
        triangles.append(torch.linalg.qr(centered, mode="r").R)
    traces = sum(triangle.square().sum() for triangle in triangles)
    root = torch.linalg.svdvals(triangles[0] @ triangles[1].T).sum()
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)
