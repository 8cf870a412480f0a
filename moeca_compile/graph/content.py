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


class _Kept:
    """A content that was seen, and the tensor that had it last."""

    def __init__(self, number: int, value: torch.Tensor) -> None:
        self.number, self.copy = number, bits(value).clone()
        self.flag: Flag | None = None  # asked of an accelerator at an earlier call
        self.seen_in(value)

    def seen_in(self, value: torch.Tensor) -> None:
        self._ref, self._version = weakref.ref(value), _version(value)

    def is_likely_in(self, value: torch.Tensor) -> bool:
        return self._ref() is value and _version(value) == self._version

    def same_in(self, value: torch.Tensor) -> torch.Tensor:
        """Whether `value` holds it: a bool where the tensor is."""
        return (self.copy == bits(value)).all()


class Contents:
    """Numbers for what tensors hold: the same number for equal bits, shape, dtype and device, and for nothing else."""

    def __init__(self) -> None:
        self._kept: dict[Any, list[_Kept]] = {}  # by kind, the latest first
        self._count = 0

    def number(self, value: torch.Tensor) -> int:
        """The number of what `value` holds; waits for an accelerator."""
        now, kept = bits(value), self._like(value)
        if kept and torch.equal(kept[0].copy, now) and not needs_device_sync(value):
            return kept[0].number  # nearly always
        found = next((one for one in kept if torch.equal(one.copy, now)), None)
        if found is None:
            self._count += 1
            found = _Kept(self._count, value)
        return self._latest(found, value)

    def ask(self, value: torch.Tensor) -> tuple[list[_Kept], list[torch.Tensor]]:
        """The same without waiting: contents that are known, and for each a bool, on the device, whether it is this."""
        kept = list(self._like(value))
        return kept, [one.same_in(value) for one in kept]

    def answer(self, value: torch.Tensor, kept: Sequence[_Kept], same: Sequence[float]) -> int:
        """The number, once the bools were read."""
        found = next((one for one, yes in zip(kept, same, strict=True) if yes), None)
        return self.number(value) if found is None else self._latest(found, value)

    def likely_number(self, value: torch.Tensor) -> tuple[int, bool]:
        """The number, not waiting for an accelerator if the tensor seems untouched: it is compared there, and what came
        out is told by a later call. Second: whether an earlier call got a wrong number so."""
        if not needs_device_sync(value):
            return self.number(value), False
        kept = self._like(value)
        one = next((one for one in kept if one.is_likely_in(value)), None)
        if one is None:
            return self.number(value), False
        if one.flag is not None and one.flag.ready():
            was_right, one.flag = one.flag.holds(), None
            if not was_right:
                kept.remove(one)
                return self.number(value), True
        one.flag = one.flag or Flag(one.same_in(value))
        return one.number, False

    def keep(self, numbers: Container[Any]) -> None:
        """Forget all contents but these."""
        self._kept = {kind: [one for one in kept if one.number in numbers] for kind, kept in self._kept.items()}

    def _like(self, value: torch.Tensor) -> list[_Kept]:
        kind = value.shape, value.dtype, value.device
        kept = self._kept.get(kind)
        if kept is None:
            kept = self._kept[kind] = []
        return kept

    def _latest(self, found: _Kept, value: torch.Tensor) -> int:
        kept = self._like(value)
        if not kept or kept[0] is not found:
            kept[:] = [found, *(one for one in kept if one is not found)][:MOST]
        if needs_device_sync(value):
            found.seen_in(value)
        return found.number


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
    row = CHUNK * 8 // flat.element_size()
    whole = flat.numel() // row * row
    if whole:
        if flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()
        yield flat[:whole].view(torch.int64).view(-1, CHUNK)
        flat = flat[whole:]
    if flat.numel():
        yield flat


@cache
def _factors() -> torch.Tensor:
    """Odd, so that a change of one bit changes the sum."""
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (CHUNK,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def _version(value: torch.Tensor) -> int:
    return -1 if value.is_inference() else value._version
