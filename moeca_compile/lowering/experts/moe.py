"""onnxruntime's own operator, `com.microsoft.MoE`: on CUDA one grouped matrix multiply a layer, without a host sync.

It routes by itself: a softmax over logits, then the k largest. Here each branch goes in as a token of its own with
k = 1 and the logarithm of its one-hot routing, so that its expert gets weight 1 and the gates stay the model's own,
whatever they are. SwiGLU wants gate and up in turn, row by row, and its constants set; "gelu" is the form with tanh.
All of it as measured with onnxruntime 1.31.1 on its CPU provider, which has the operator in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ours -> its `activation_type`; with gates there is SwiGLU alone
_PLAIN = {"silu": "silu", "relu": "relu", "identity": "identity", "gelu_tanh": "gelu"}
_SWIGLU = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
_NEVER = -1e4  # the logarithm of no weight: its exponential is 0, and float16 holds it
SMALLEST = 16  # of hidden and intermediate sizes, on CUDA


def why_not(dtype: torch.dtype, width: int, hidden: int, out: int, gated: bool, activation: str) -> str:
    """What keeps the operator from these experts; "" if nothing does."""
    if gated and activation != "silu":
        return f"gated {activation}: with gates it has SwiGLU alone"
    if activation not in _PLAIN:
        return f"the activation {activation}: it has {', '.join(_PLAIN)}"
    if width != out:
        return f"experts from {width} to {out} channels: it keeps their number"
    if min(width, hidden) < SMALLEST:
        return f"{width} channels with {hidden} hidden ones: on CUDA it needs {SMALLEST} of each"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return str(dtype)
    return ""


def first(up: Sequence[Tensor], gate: Sequence[Tensor]) -> Tensor:
    """E weights [I, D] or biases [I] -> [E, I, D] or [E, I], with gates [E, 2 I, D]: gate and up in turn."""
    ups = torch.stack(list(up))
    return torch.stack([torch.stack(list(gate)), ups], dim=2).flatten(1, 2) if gate else ups


def first_bias(up: Sequence[Tensor], gate: Sequence[Tensor], gated: bool) -> Tensor:
    """As `first`, where one of the two may have no biases: [E, I] or [E, 2 I]."""
    if not gated:
        return first(up, ())
    zeros = [torch.zeros_like(bias) for bias in up or gate]
    return first(up or zeros, gate or zeros)


def second(down: Sequence[Tensor]) -> Tensor:
    """E weights [D, I] or biases [D] -> [E, D, I] or [E, D]."""
    return torch.stack(list(down))


def moe(
    x: Tensor, idx: Tensor, fc1: Tensor, fc2: Tensor, fc1_bias: Tensor | None, fc2_bias: Tensor | None, gated: bool,
    activation: str,
) -> Tensor:  # fmt: skip
    """x [T, D], ids [T, K], weights from `first` and `second` -> y [T, K, D]."""
    tokens, top_k = idx.shape
    rows = x.unsqueeze(1).expand(tokens, top_k, x.shape[1]).reshape(-1, x.shape[1])
    mine = idx.reshape(-1, 1) == torch.arange(fc1.shape[0], device=idx.device)
    logits = torch.where(mine, x.new_zeros(()), x.new_full((), _NEVER))
    y: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        [rows, logits, fc1, fc1_bias, fc2, fc2_bias],
        {"k": 1, "activation_type": "swiglu" if gated else _PLAIN[activation], **(_SWIGLU if gated else {})},
        dtype=x.dtype,
        shape=(rows.shape[0], fc2.shape[1]),
        version=1,
    )
    # NOTE: onnxruntime 1.31.1 on CPUs lets the operator write over its input where nobody reads that any more, and
    # then computes on zeros. Someone who reads it after the operator keeps it.
    y = torch.where(torch.ones((), dtype=torch.bool), y, rows)
    return y.reshape(tokens, top_k, fc2.shape[1])
