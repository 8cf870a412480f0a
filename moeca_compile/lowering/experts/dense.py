"""Every expert on every token, and the routed results picked out: static sizes, and E / K times the arithmetic.

For targets that can't gather a number of rows that depends on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.ops.experts import activate_


def dense(
    x: Tensor, idx: Tensor, up: Tensor, down: Tensor, gate: Tensor | None,
    up_bias: Tensor | None, down_bias: Tensor | None, gate_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """x [T, D], ids [T, K], weights as `packing.py` makes them -> y [T, K, O]."""
    tokens = x.shape[0]
    y = run_experts(x.unsqueeze(0), up, down, gate, up_bias, down_bias, gate_bias, activation)  # [E, T, O]
    rows = idx * tokens + torch.arange(tokens, device=idx.device).unsqueeze(1)
    return y.reshape(-1, y.shape[-1]).index_select(0, rows.reshape(-1)).reshape(tokens, idx.shape[1], y.shape[-1])


def run_experts(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None,
    up_bias: Tensor | None, down_bias: Tensor | None, gate_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """Each expert on its own rows: x [E or 1, R, D] -> [E, R, O]."""
    h = _linear(x, up, up_bias)
    h = activate_(h, activation) if gate is None else activate_(_linear(x, gate, gate_bias), activation) * h
    return _linear(h, down, down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = torch.matmul(x, weight)
    return product if bias is None else product + bias
