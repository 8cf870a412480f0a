"""A sketch of a sampler's inputs for one seed, to detect stored samples of another prompt or latent.

The sketch covers the tensors that the sampler passes to the model in its first call: for each its root mean square and
two random projections. Sketches that differ only by rounding, on another machine or library, are equal; those of
another prompt, label or latent are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

PROJECTIONS = 2
TOLERANCE = 1e-3  # of the root mean square
_CHUNK = 1 << 20
_LARGEST = 1e6  # stands for infinity, which occurs in attention masks

Origin = tuple[tuple[float, ...], ...]


def origin_of(args: Iterable[Any]) -> Origin:
    """The sketch of each tensor and number among the arguments of a call; a number is its own sketch."""
    sketches = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            sketches.append(_sketch(arg))
        elif isinstance(arg, (bool, int, float)):
            sketches.append((float(arg),))
    return tuple(sketches)


def is_same(origin: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    """Whether two origins are equal up to rounding."""
    return len(origin) == len(other) and all(_is_close(a, b) for a, b in zip(origin, other, strict=True))


def _is_close(sketch: Sequence[float], other: Sequence[float]) -> bool:
    if len(sketch) != len(other):
        return False
    tolerance = TOLERANCE * max(abs(sketch[0]), abs(other[0]))
    return all(abs(a - b) <= tolerance for a, b in zip(sketch, other, strict=True))


def _sketch(tensor: torch.Tensor) -> tuple[float, ...]:
    """Root mean square and projections; float64."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = real.detach().reshape(-1).cpu().to(torch.float64).nan_to_num(0.0, _LARGEST, -_LARGEST)
    generator = torch.Generator().manual_seed(0)
    square, sums = 0.0, [0.0] * PROJECTIONS
    for chunk in values.split(_CHUNK):
        square += float(chunk.square().sum())
        weights = torch.randn(PROJECTIONS, len(chunk), generator=generator, dtype=torch.float64)
        sums = [total + float(part) for total, part in zip(sums, weights @ chunk, strict=True)]
    root = math.sqrt(max(len(values), 1))
    return (math.sqrt(square) / root, *(total / root for total in sums))
