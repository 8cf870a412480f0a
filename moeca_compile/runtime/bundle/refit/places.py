"""Where tensors lie in a file of weights."""

from __future__ import annotations

from typing import BinaryIO

PAGE, LINE = 4096, 64
PAGED = 1 << 18  # bytes; from here on a tensor begins a page, for mapping; below, a page's end lost would weigh more


def append(file: BinaryIO, raw: bytes) -> int:
    """Write a tensor behind what the file has.

    Returns:
        Where it begins.
    """
    file.seek(-file.tell() % (PAGE if len(raw) >= PAGED else LINE), 1)
    offset = file.tell()
    file.write(raw)
    return offset
