"""What each part of a model costs: multiply-accumulates counted by torch on the model as shipped.

The count of whole trajectories is then calls x cost; moeca's own count, node by node, agrees (tests/benchmarks/peers).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.workload import Workload


@cache
def shares(work: Workload) -> dict[str, float]:
    """By module, such as "blocks.0.attn": its share of a call's multiply-accumulates."""
    model = work.shipped()
    # Fused attention has no entry in the counter on a CPU; its plain form is two matrix products.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*work.inputs_of(work.batches()[0]))
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    return {name.partition(".")[2]: value / flops["Global"] for name, value in flops.items()}


@cache
def without_modules(work: Workload) -> float:
    """Of a step that skips every attention and MoE layer."""
    return 1 - sum(shares(work)[name] for name in work.names(work.shipped()))


@cache
def of_blocks(work: Workload, stack: str, but: int = 0) -> float:
    """Of a stack's blocks but so many; all blocks of a stack cost the same."""
    return (len(work.shipped().get_submodule(stack)) - but) * shares(work)[f"{stack}.0"]
