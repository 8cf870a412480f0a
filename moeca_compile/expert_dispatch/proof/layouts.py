"""A method that takes three arguments, tokens, expert ids and gate weights, in some order and some shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.expert_dispatch.proof.candidate import Arguments, Entry
from moeca_compile.expert_dispatch.proof.harness import Harness, length, tokens_of
from moeca_compile.expert_dispatch.source.loop import Loop

_BATCH = 2


@dataclass(frozen=True)
class Layout:
    """Shapes of the three arguments, for T tokens, B samples, D features, E experts and K experts a token.

    Attributes:
        x: tokens, "TD" or "BTD".
        idx: expert ids, "TK" or "flat" ([T * K]).
        w: gate weights, "TK", "flat" ([T * K]), "column" ([T * K, 1]) or "TE".
    """

    x: str
    idx: str
    w: str


PAIRED = (Layout("TD", "TK", "TK"), Layout("BTD", "TK", "TK"), Layout("TD", "TK", "TE"))
FLAT = (
    Layout("TD", "flat", "column"),
    Layout("TD", "flat", "flat"),
    Layout("TD", "flat", "TK"),
    Layout("TD", "TK", "column"),
)


def takes_three(loop: Loop) -> bool:
    """Whether the method takes three arguments and no more: tokens, ids and weights, it may be."""
    return loop.source.is_plain and len(loop.source.required) == 3


def direct_entries(harness: Harness, loop: Loop) -> Iterator[Entry]:
    """Ways to call a three-argument method directly, its arguments in the usual order."""
    if takes_three(loop):
        for layout in PAIRED + FLAT:
            for top_k in possible_k(harness):
                yield entry_of(loop, loop.source.required, layout, top_k)


def possible_k(harness: Harness) -> list[int]:
    """K is often a setting of the module or its router. K = 1 and K = E say less: no order, no expert left out."""
    settings: set[int] = set()
    for module in harness.module.modules():
        settings |= {v for v in vars(module).values() if type(v) is int and 1 <= v <= harness.num_experts}
    return sorted(settings | {1, 2}, key=lambda k: (k in (1, harness.num_experts), k not in settings, k))


def entry_of(loop: Loop, roles: tuple[str, ...], layout: Layout, top_k: int) -> Entry:
    """A call of the method in which the arguments named in `roles` are tokens, ids and weights, in this order."""
    order = [roles.index(name) for name in loop.source.required]

    def arguments(harness: Harness, seed: int, dtype: torch.dtype) -> Arguments:
        routing = _routing(harness, layout, top_k, seed, dtype)
        return tuple(routing[i] for i in order)

    return Entry(loop.name, arguments)


def _routing(harness: Harness, layout: Layout, top_k: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, idx, w; every expert is hit for odd seeds, as few as can be for even ones."""
    num_experts = harness.num_experts
    count = _BATCH * length(seed, num_experts)
    x = tokens_of(seed, (count, harness.experts.in_features), harness.device, dtype)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(1 if seed % 2 == 0 else count, num_experts, generator=generator).expand(count, -1).clone()
        if seed % 2:
            scores[torch.arange(count), torch.arange(count) % num_experts] += 1.0
        idx = scores.topk(top_k, sorted=False).indices
        w = torch.rand(count, num_experts if layout.w == "TE" else top_k, generator=generator) + 0.1
    lead = (_BATCH, count // _BATCH) if layout.x == "BTD" else (count,)
    shapes = {"TK": (*lead, top_k), "flat": (-1,), "column": (-1, 1), "TE": (*lead, num_experts)}
    return (
        x.reshape(*lead, -1),
        idx.reshape(shapes[layout.idx]).to(harness.device),
        w.reshape(shapes[layout.w]).to(harness.device, dtype),
    )
