"""Which of a method's tensors can be its tokens, expert ids and gate weights, by dtype, size and range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.proof.attempt import Harness

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
    tokens = [n for n in names if _floats(values[n]) and values[n].shape[-1:] == (width,) and values[n].numel()]
    ids = [n for n in names if _is_ids(values[n], num_experts)]
    weights = [n for n in names if _floats(values[n])]
    beside = [[n for n in names if _floats(values[n]) and values[n].shape[-1] == one] for one in harness.extra]
    for per_sample, (x, idx, w, *extra) in product((False, True), product(tokens, ids, weights, *beside)):
        count = values[x].shape[0] if per_sample else values[x].numel() // width
        if per_sample and (values[x].dim() != 3 or values[idx].shape[0] != count or values[w].shape[:1] != (count,)):
            continue
        rows = values[x].numel() // width
        if any(values[n].numel() // values[n].shape[-1] != rows for n in extra):
            continue
        chosen = values[idx].numel()
        if chosen % count or not count <= chosen <= count * num_experts:
            continue
        if values[w].numel() == chosen:
            yield Roles(x, idx, w, False, per_sample, tuple(extra))
        elif values[w].numel() == count * num_experts:
            yield Roles(x, idx, w, True, per_sample, tuple(extra))


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 0


def _is_ids(value: Tensor, num_experts: int) -> bool:
    if value.dtype not in (torch.int64, torch.int32) or not value.numel() or not value.dim():
        return False
    return int(value.min()) >= 0 and int(value.max()) < num_experts
