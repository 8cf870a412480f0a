"""What each part of the model costs: multiply-accumulates counted by torch on the model as shipped.

The count of whole trajectories is then calls x cost; moeca's own count, node by node, agrees (tests/benchmarks/peers).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.workload import QUICK, batches, inputs_of, shipped


@cache
def shares() -> dict[str, float]:
    """By module, such as "blocks.0.attn": its share of a call's multiply-accumulates."""
    model = shipped()
    # Fused attention has no entry in the counter on a CPU; its plain form is two matrix products.
    with torch.no_grad(), FlopCounterMode(display=False, depth=4) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs_of(batches(QUICK)[0]))
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    return {name.partition(".")[2]: value / flops["Global"] for name, value in flops.items()}


@cache
def blocks() -> int:
    return len(shipped().blocks)


@cache
def without_modules() -> float:
    """Of a step that skips every attention and MoE layer."""
    return 1 - sum(shares()[f"blocks.{i}.{part}"] for i in range(blocks()) for part in ("attn", "moe"))


def with_blocks(run: int) -> float:
    """Of a step that runs so many whole blocks, and what lies around the blocks; all blocks cost the same."""
    return 1 - (blocks() - run) * shares()["blocks.0"]
