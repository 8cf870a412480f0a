"""Which of a method's tensors can be its tokens, expert ids and gate weights, by dtype, size and range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.proof.harness import Harness

Key = TypeVar("Key")


@dataclass(frozen=True)
class Roles(Generic[Key]):
    """`dense`: the weights cover all experts. `per_sample`: ids and weights are for samples, not for tokens. `extra`:
    what else the experts take for each token."""

    x: Key
    idx: Key
    w: Key
    dense: bool
    per_sample: bool = False
    extra: tuple[Key, ...] = ()


def roles(harness: Harness, names: Sequence[Key], values: Mapping[Key, Tensor]) -> Iterator[Roles[Key]]:
    """Every assignment that fits, routing for each token first."""
    width, num_experts = harness.experts.in_features, harness.num_experts
    floats = [n for n in names if values[n].is_floating_point() and values[n].dim()]
    tokens = [n for n in floats if values[n].shape[-1:] == (width,) and values[n].numel()]
    ids = [n for n in names if _is_ids(values[n], num_experts)]
    extra = [[n for n in floats if values[n].shape[-1] == size] for size in harness.extra]
    # Every choice: nothing but size and, for whoever asks, value tells which of several tensors it is.
    for per_sample in (False, True):
        for x, idx, w, *rest in product(tokens, ids, floats, *extra):
            rows = values[x].numel() // width
            if per_sample and not _are_per_sample(values[x], values[idx], values[w]):
                continue
            if any(values[n].numel() // values[n].shape[-1] != rows for n in rest):
                continue
            count = values[x].shape[0] if per_sample else rows
            chosen = values[idx].numel()
            if chosen % count or not count <= chosen <= count * num_experts:
                continue
            if values[w].numel() == chosen:
                yield Roles(x, idx, w, False, per_sample, tuple(rest))
            elif values[w].numel() == count * num_experts:
                yield Roles(x, idx, w, True, per_sample, tuple(rest))


def _are_per_sample(x: Tensor, idx: Tensor, w: Tensor) -> bool:
    return x.dim() == 3 and idx.shape[0] == x.shape[0] and w.shape[:1] == x.shape[:1]


def _is_ids(value: Tensor, num_experts: int) -> bool:
    if value.dtype not in (torch.int64, torch.int32) or not value.numel() or not value.dim():
        return False
    return int(value.min()) >= 0 and int(value.max()) < num_experts
