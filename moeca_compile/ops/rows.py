"""`moeca::unwritten`: rows of a buffer, and the claim that some index doesn't point at them, checked when it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.errors import CaptureError

_LIBRARY = torch.library.Library("moeca", "FRAGMENT")
_LIBRARY.define(
    "unwritten(Tensor part, Tensor rows, int start, int end, int length) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def points_at(rows: Tensor, start: int, end: int, length: int) -> bool:
    """Whether an index (int64 [R], negative ones from the end) or a mask (bool [length]) points into [start, end)."""
    if rows.dtype == torch.bool:
        return bool(rows[start:end].any())
    rows = torch.where(rows < 0, rows + length, rows)
    return bool(((rows >= start) & (rows < end)).any())


def unwritten(part: Tensor, rows: Tensor, start: int, end: int, length: int) -> Tensor:
    """Copy rows [start, end) of a buffer of `length` rows, after checking that `rows` points at none of them.

    Args:
        part: the rows, [end - start, ...], any dtype.
        rows: what is written: an index, int64 [R], negative ones from the end; or a mask, bool [length].
        start, end: which rows of the buffer `part` is.
        length: how many rows the buffer has.

    Returns:
        A contiguous copy of `part`.

    Raises:
        CaptureError: `rows` points at one of them.
    """
    if points_at(rows, start, end, length):
        raise CaptureError(
            f"the model writes tokens of the latent into rows {start} to {end - 1} of a buffer, which it then reads as "
            'another part of its sequence. Keep both parts apart, or compile with disable=("separate_rows",)'
        )
    return part.clone(memory_format=torch.contiguous_format)


def _fake(part: Tensor, rows: Tensor, start: int, end: int, length: int) -> Tensor:
    return torch.empty_like(part, memory_format=torch.contiguous_format)


_LIBRARY.impl("unwritten", unwritten, "CompositeExplicitAutograd")
torch.library.register_fake("moeca::unwritten", _fake, lib=_LIBRARY)
UNWRITTEN = torch.ops.moeca.unwritten.default
