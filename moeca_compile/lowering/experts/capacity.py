"""A fixed number of rows an expert: static sizes, and little more arithmetic than the routing asks for.

The branches of an expert take its rows in order, and one that finds them taken is dropped: its result is 0. How many
were is counted, so that whoever runs the graph can say so. A capacity of at least the tokens drops nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.lowering.experts.dense import run_experts

Ratio = tuple[int, int]


def rows_of(factor: Ratio, branches: int, experts: int) -> int:
    """The capacity: `factor` times the rows that an even routing gives an expert, rounded down, and one more (a size of
    1 would pass for one that never changes)."""
    numerator, denominator = factor
    return branches * numerator // (experts * denominator) + 1


def capacity(
    x: Tensor, idx: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str, factor: Ratio,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [T, D], ids [T, K], weights as `packing.py` makes them -> y [T, K, O], and the number of dropped branches,
    int64 []."""
    (tokens, top_k), experts = idx.shape, up.shape[0]
    room = rows_of(factor, tokens * top_k, experts)
    ids = idx.reshape(-1)
    mine = ids.unsqueeze(1) == torch.arange(experts, device=ids.device)  # [T * K, E]
    before = mine.to(torch.int64).cumsum(0).gather(1, ids.unsqueeze(1)).squeeze(1) - 1  # of the same expert
    late = before >= room
    token = torch.arange(tokens * top_k, device=ids.device) // top_k
    # rows that nobody takes compute token 0 again; the last column is for who is late
    table = torch.zeros(experts, room + 1, dtype=torch.int64, device=ids.device)
    table = table.index_put((ids, before.clamp(max=room)), token)[:, :room]
    y = run_experts(x[table], up, down, gate, up_bias, down_bias, gate_bias, activation)
    y = torch.where(late.unsqueeze(1), y.new_zeros(()), y[ids, before.clamp(max=room - 1)])
    return y.reshape(tokens, top_k, y.shape[-1]), late.sum()
