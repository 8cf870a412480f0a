"""The weights of a layer's experts as one tensor each, in the layout of a batched matrix multiply.

Made from weights alone, these calls are folded into constants (`../onnx/constants.py`): a graph only sees the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def matrices(weights: Sequence[Tensor]) -> Tensor:
    """E weights [O, I] of linears -> [E, I, O]."""
    return torch.stack(list(weights)).transpose(1, 2).contiguous()


def vectors(biases: Sequence[Tensor]) -> Tensor:
    """E biases [O] -> [E, 1, O]."""
    return torch.stack(list(biases)).unsqueeze(1)
