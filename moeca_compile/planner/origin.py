"""What a seed's sample was made from, in a few numbers: so that kept samples of another prompt or latent are noticed.

Compared are the tensors that the sampler hands to the model in its first call. Each is kept as its root mean square and
two random projections. What another machine or library rounds differently is alike; another prompt, label or latent
isn't.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

PROJECTIONS = 2
TOLERANCE = 1e-3  # of the root mean square
_CHUNK = 1 << 20
_LARGEST = 1e6  # stands for infinity, as in attention masks

Origin = tuple[tuple[float, ...], ...]


def origin_of(args: Iterable[Any]) -> Origin:
    """Of each tensor its root mean square and projections; of each number itself."""
    return tuple(_sketch(one) if isinstance(one, torch.Tensor) else (float(one),) for one in args if _counts(one))


def alike(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> bool:
    """Whether two origins are the same but for rounding."""
    return len(one) == len(other) and all(
        len(a) == len(b) and all(abs(x - y) <= TOLERANCE * max(abs(a[0]), abs(b[0])) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def _counts(arg: Any) -> bool:
    return isinstance(arg, (torch.Tensor, bool, int, float))


def _sketch(tensor: torch.Tensor) -> tuple[float, ...]:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = real.detach().reshape(-1).cpu().to(torch.float64).nan_to_num(0.0, _LARGEST, -_LARGEST)
    generator = torch.Generator().manual_seed(0)
    square, sums = 0.0, [0.0] * PROJECTIONS
    for chunk in values.split(_CHUNK):
        square += float(chunk.square().sum())
        weights = torch.randn(PROJECTIONS, len(chunk), generator=generator, dtype=torch.float64)
        sums = [before + float(more) for before, more in zip(sums, weights @ chunk, strict=True)]
    root = math.sqrt(max(len(values), 1))
    return (math.sqrt(square) / root, *(one / root for one in sums))
