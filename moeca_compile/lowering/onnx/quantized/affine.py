"""Which scales and zero points a graph's own operators give integers: found by trying, whatever the operators are.

A dequantization computes (integer - zero) * scale, element by element. So it is asked for the values of 0 and of 1,
which give scale and zero point of each element, and then for the values of the integers themselves, which must be those
that follow. No class of tensors and no operator needs to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_TOLERANCE = 1e-6  # relative to the largest value: float32's rounding
_WHOLE = 1e-2  # that a zero point found by division may be from a whole number


@dataclass(frozen=True)
class Affine:
    """values[n, k] = (integers[n, k] - zero[n, b]) * scale[n, b], with b = k // block.

    Attributes:
        integers: int8 [N, K].
        scale: floating point [N, B].
        zero: int8 [N, B].
    """

    integers: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def block(self) -> int:
        """How many values of a row share a scale."""
        return self.integers.shape[1] // self.scale.shape[1]

    @property
    def bits(self) -> int:
        """4 where all integers and zero points are from -8 to 7, else 8."""
        extremes = [int(f(part)) for part in (self.integers, self.zero) for f in (torch.min, torch.max)]
        return 4 if min(extremes) >= -8 and max(extremes) <= 7 else 8

    def times(self, factor: Tensor) -> Affine:
        """The same with row n multiplied by `factor[n]`."""
        return Affine(self.integers, self.scale * factor.reshape(-1, 1), self.zero)


def affine_of(values: Callable[[Tensor], Tensor], stored: Tensor, is_transposed: bool) -> Affine | None:
    """What a dequantization is.

    Args:
        values: of integers in the shape and dtype of `stored`: floating point [N, K], or [K, N].
        stored: int8 or uint8, two dimensions.
        is_transposed: whether the values are [K, N].

    Returns:
        None: they aren't integers times scales.
    """
    result = values(stored)
    if result.dim() != 2 or stored.dim() != 2 or not result.is_floating_point():
        return None

    for turned in (is_transposed, not is_transposed):  # how the integers lie, beside the values as [N, K]

        def weight_of(integers: Tensor, turned: bool = turned) -> Tensor:
            given = values(integers.t().contiguous() if turned else integers)
            return given.t() if is_transposed else given

        weight = result.t() if is_transposed else result
        integers = stored.t() if turned else stored
        if integers.shape != weight.shape:
            continue
        found = _scales(weight_of, integers)
        if found is None:
            continue
        scale, zero = found
        expected = ((integers.to(scale.dtype) - zero) * scale - weight).abs().max()
        if expected <= _TOLERANCE * weight.abs().max():
            shift = 0 if stored.dtype == torch.int8 else 8 if int(max(integers.max(), zero.max())) < 16 else 128
            signed = [(part.to(torch.int16) - shift).to(torch.int8).contiguous() for part in (integers, zero)]
            return _in_blocks(signed[0], scale, signed[1])
    return None


def _scales(weight_of: Callable[[Tensor], Tensor], integers: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scale and zero point of each element, both floating point [N, K]."""
    least, most = torch.iinfo(integers.dtype).min, torch.iinfo(integers.dtype).max
    at_zero = weight_of(torch.zeros_like(integers))
    step = weight_of(torch.ones_like(integers)) - at_zero
    rough = torch.where(step == 0, torch.zeros_like(step), -at_zero / torch.where(step == 0, 1, step))
    zero = rough.round()
    if not (torch.isfinite(rough).all() and ((rough - zero).abs() <= _WHOLE).all()):
        return None
    if zero.min() < least or zero.max() > most:
        return None
    sign = torch.where(zero < most, 1, -1).to(step.dtype)
    return weight_of((zero + sign).to(integers.dtype)) * sign, zero  # one from the zero point: the scale itself


def _in_blocks(integers: Tensor, scale: Tensor, zero: Tensor) -> Affine:
    """With the longest blocks whose elements have one scale and one zero point."""
    rows, width = integers.shape
    for block in _divisors(width):
        parts = [part.reshape(rows, width // block, block) for part in (scale, zero)]
        if all(torch.equal(part, part[..., :1].expand_as(part)) for part in parts):
            return Affine(integers, *(part[..., 0].contiguous() for part in parts))
    raise AssertionError("blocks of one element are always alike")


def _divisors(number: int) -> Iterator[int]:
    """From the largest down."""
    return (number // i for i in range(1, number + 1) if number % i == 0)
