"""Experts that run on even numbers of rows, so that a token gets the same bits whoever else is in the call.

How a matrix product rounds depends on its number of rows, and an expert's number of rows depends on all tokens of a
call. Inside `even_rows` each expert runs on blocks of `ROWS` rows, the last of which is filled up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

ROWS = 32

_local = threading.local()


@contextmanager
def even_rows() -> Iterator[None]:
    """In this thread `moeca::experts` and `moeca::branches_` run experts on even numbers of rows."""
    before, _local.active = are_even(), True
    try:
        yield
    finally:
        _local.active = before


def are_even() -> bool:
    """Whether rows are even in this thread."""
    return getattr(_local, "active", False)


def most(counts: Sequence[int]) -> int:
    """The largest number of rows that an expert runs on at once."""
    return ROWS if are_even() else max(counts)


def parts(rows: Tensor, counts: Sequence[int], out: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that has rows, its rows, and where its results go.

    Args:
        rows: [R, D], one expert's after the other's, `counts[e]` of them.
        out: [R, D_out], filled when the iterator goes on.
    """
    start = 0
    if not are_even():
        for e, count in enumerate(counts):
            if count:
                yield e, rows[start : start + count], out[start : start + count]
            start += count
        return
    block, result = rows.new_zeros(ROWS, rows.shape[1]), out.new_empty(ROWS, out.shape[1])
    for e, count in enumerate(counts):
        for first in range(start, start + count, ROWS):
            last = min(first + ROWS, start + count)
            block[: last - first] = rows[first:last]
            yield e, block, result
            out[first:last] = result[: last - first]
        start += count
