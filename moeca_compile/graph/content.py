"""Whether a tensor still holds what it held, told by its bits.

Version counters don't tell: `.data`, numpy views, DLPack, inference tensors and kernels of the caller write past them.
An input is compared with a copy. A weight is compared with sums over its bits, for a copy would take its memory again.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from moeca_compile.graph.nowait import Flag

MOST = 12  # contents of one shape, dtype and device that are kept
CHUNK = 4095  # words of eight bytes that one sum is over; odd, so that a change of all signs shows
SHARES = 32  # a sample is one of so many parts of a weight

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def needs_device_sync(value: Any) -> bool:
    """Whether reading the tensor waits for an accelerator."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


class _Content:
    """A content that a tensor had, and the tensor that had it last."""

    def __init__(self, number: int, value: torch.Tensor) -> None:
        self.number, self.copy = number, bits(value).clone()
        self.flag: Flag | None = None  # asked of an accelerator at an earlier call
        self.note_holder(value)

    def note_holder(self, value: torch.Tensor) -> None:
        self._ref, self._version = weakref.ref(value), _version(value)

    def is_likely_held_by(self, value: torch.Tensor) -> bool:
        return self._ref() is value and _version(value) == self._version

    def equal_bits(self, value: torch.Tensor) -> torch.Tensor:
        """Whether `value` holds it: a bool where the tensor is."""
        return (self.copy == bits(value)).all()


class Contents:
    """Numbers for what tensors hold: the same number for equal bits, shape, dtype and device, and for nothing else."""

    def __init__(self) -> None:
        self._contents: dict[Any, list[_Content]] = {}  # by kind, the latest first
        self._count = 0

    def number(self, value: torch.Tensor) -> int:
        """The number of what `value` holds; waits for an accelerator."""
        value_bits, contents = bits(value), self._of_kind(value)
        if contents and torch.equal(contents[0].copy, value_bits) and not needs_device_sync(value):
            return contents[0].number  # nearly always
        content = next((known for known in contents if torch.equal(known.copy, value_bits)), None)
        if content is None:
            self._count += 1
            content = _Content(self._count, value)
        return self._move_to_front(content, value)

    def ask(self, value: torch.Tensor) -> tuple[list[_Content], list[torch.Tensor]]:
        """The same without waiting: contents that are known, and for each a bool, on the device, whether it is this."""
        contents = list(self._of_kind(value))
        return contents, [content.equal_bits(value) for content in contents]

    def answer(self, value: torch.Tensor, contents: Sequence[_Content], is_equal: Sequence[float]) -> int:
        """The number, once the bools were read."""
        content = next((known for known, equal in zip(contents, is_equal, strict=True) if equal), None)
        return self.number(value) if content is None else self._move_to_front(content, value)

    def likely_number(self, value: torch.Tensor) -> tuple[int, bool]:
        """The number, not waiting for an accelerator if the tensor seems untouched: it is compared there, and what came
        out is told by a later call. Second: whether an earlier call got a wrong number so."""
        if not needs_device_sync(value):
            return self.number(value), False
        contents = self._of_kind(value)
        content = next((known for known in contents if known.is_likely_held_by(value)), None)
        if content is None:
            return self.number(value), False
        if content.flag is not None and content.flag.ready():
            was_right, content.flag = content.flag.holds(), None
            if not was_right:
                contents.remove(content)
                return self.number(value), True
        content.flag = content.flag or Flag(content.equal_bits(value))
        return content.number, False

    def keep(self, numbers: Container[Any]) -> None:
        """Forget all contents but these."""
        for kind, contents in self._contents.items():
            self._contents[kind] = [content for content in contents if content.number in numbers]

    def _of_kind(self, value: torch.Tensor) -> list[_Content]:
        key = value.shape, value.dtype, value.device
        contents = self._contents.get(key)
        if contents is None:
            contents = self._contents[key] = []
        return contents

    def _move_to_front(self, content: _Content, value: torch.Tensor) -> int:
        contents = self._of_kind(value)
        if not contents or contents[0] is not content:
            contents[:] = [content, *(other for other in contents if other is not content)][:MOST]
        if needs_device_sync(value):
            content.note_holder(value)
        return content.number


class Stamp:
    """Sums that tell a weight on the host from what it becomes when some of it is written to.

    Each is over 32 KiB and wraps at 64 bits; every eight bytes are multiplied by a number of their place, so that
    values which change places are seen too. A small weight is kept as a copy. Not seen: a write that changes only the
    highest bit of an even number of the words of a sum (each adds 2**63, whatever it is multiplied by).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._sums = [self._sum(part) for part in _parts(weight)]

    def matches(self, weight: torch.Tensor) -> bool:
        parts = list(_parts(weight))
        return len(parts) == len(self._sums) and all(
            torch.equal(self._sum(part), sums) for part, sums in zip(parts, self._sums, strict=True)
        )

    def sample_matches(self, weight: torch.Tensor, turn: int) -> bool:
        """Whether a part of the weight is what it was: another one at each of `SHARES` turns."""
        for part, sums in zip(_parts(weight), self._sums, strict=True):
            if part.dim() == 2:
                size = -(-part.shape[0] // SHARES)
                first = turn % -(-part.shape[0] // size) * size
                part, sums = part[first : first + size], sums[first : first + size]
            if not torch.equal(self._sum(part, copied=False), sums):
                return False
        return True

    @staticmethod
    def _sum(part: torch.Tensor, copied: bool = True) -> torch.Tensor:
        if part.dim() == 2:
            return torch.mv(part, _factors())
        return part.clone() if copied else part


def bits(value: torch.Tensor) -> torch.Tensor:
    """The tensor as whole numbers, where it lies: NaN equals itself there, and 0 isn't -0."""
    if value.requires_grad:
        value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    word = _WORDS[value.element_size()]
    return value if value.dtype == word else value.view(word)


def _parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bits of a weight, as [n, CHUNK] of int64 and what is left over. A tensor made of others gives theirs."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
        return
    flat = bits(weight).contiguous().view(-1)
    row_length = CHUNK * 8 // flat.element_size()
    full_rows = flat.numel() // row_length * row_length
    if full_rows:
        if flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()
        yield flat[:full_rows].view(torch.int64).view(-1, CHUNK)
        flat = flat[full_rows:]
    if flat.numel():
        yield flat


@cache
def _factors() -> torch.Tensor:
    """Odd, so that a change of one bit changes the sum."""
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (CHUNK,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def _version(value: torch.Tensor) -> int:
    return -1 if value.is_inference() else value._version
