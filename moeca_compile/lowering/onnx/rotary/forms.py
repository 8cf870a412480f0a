"""A rotation as ONNX's operator, which takes a cosine and a sine for each pair of each token of each sequence."""

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[EllipsisType, slice | int]


class Layout(NamedTuple):
    """How what is turned lies: [sequences, tokens, heads, D], [sequences, heads, tokens, D] or [sequences, tokens, D].

    Attributes:
        rank: the number of dimensions before D.
        heads: which of them counts the heads; None: there is one.
        head_count: 1 where there is one.
        width: D, which may be written as two dimensions.
        interleaved: whether the members of a pair are neighbors; else they are D / 2 apart.
    """

    rank: int
    heads: int | None
    head_count: int
    width: int
    interleaved: bool


def half_of(table: Tensor, x: Tensor, place: Place, layout: Layout) -> Tensor:
    """Of what x is multiplied by, the numbers that are one for each pair: [sequences, tokens, D / 2].

    Args:
        table: its last dimensions are D, D / 2, or D / 2 and 2; what is missing before them, or 1, holds for all.
        x: for its sizes.
        place: which numbers of the table.
    """
    found = table[place]
    found = found.reshape(*[1] * (layout.rank + 1 - found.dim()), *found.shape)
    if layout.heads is not None:
        found = found.select(layout.heads, 0)
    return found.expand(x.shape[0], x.shape[2 if layout.heads == 1 else 1], layout.width // 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, last: tuple[int, ...]) -> Tensor:
    """x with every pair of channels turned, as [..., *last]; cos and sin as `half_of` gives them."""
    lead = x.shape[: layout.rank]
    if layout.heads == 1:
        rows, heads = x.reshape(*lead, layout.width), 0  # the operator reads them from four dimensions
    else:
        rows, heads = x.reshape(*lead[:2], layout.head_count * layout.width), layout.head_count
    result: Tensor = torch.onnx.ops.rotary_embedding(
        *map(_float32, (rows, cos, sin)), interleaved=layout.interleaved, num_heads=heads
    )
    return result.reshape(*lead, *last)


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()
