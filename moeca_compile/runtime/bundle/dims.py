"""Sizes that depend on the batch: `a * batch + b`, written as a number or as text such as "2*batch" or "batch+1"."""

from __future__ import annotations

import re

Dim = int | str  # a size, or an expression of the batch
DIM_PATTERN = r"^([1-9][0-9]{0,9}\*)?batch([+-][1-9][0-9]{0,9})?\Z"
_DIM = re.compile(r"(?:(\d+)\*)?batch([+-]\d+)?")


def expression(factor: int, offset: int) -> Dim:
    """factor * batch + offset."""
    if not factor:
        return offset
    return f"{f'{factor}*' if factor != 1 else ''}batch{f'{offset:+d}' if offset else ''}"


def parts(dim: Dim) -> tuple[int, int]:
    """a and b of a * batch + b."""
    if isinstance(dim, int):
        return 0, dim
    match = _DIM.fullmatch(dim)
    assert match is not None, dim  # the manifest's type allows no other text
    return int(match[1] or 1), int(match[2] or 0)


def evaluate(dim: Dim, batch: int) -> int:
    """The size at this batch."""
    factor, offset = parts(dim)
    return factor * batch + offset


def batch_in(dim: Dim, size: int) -> int | None:
    """The batch for which `dim` is `size`: None if there is none, -1 if every batch fits."""
    factor, offset = parts(dim)
    if not factor:
        return -1 if size == offset else None
    batch, rest = divmod(size - offset, factor)
    return None if rest or batch < 0 else batch
