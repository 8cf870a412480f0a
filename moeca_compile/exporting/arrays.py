"""A tensor as the array that a bundle keeps of it."""

from __future__ import annotations

from typing import Any

import torch

from moeca_compile.runtime.bundle.bfloat16 import to_stored


def to_numpy(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # numpy has no such type: its bits
        return tensor.detach().contiguous().view(torch.uint16).numpy()
    return to_stored(tensor.detach().numpy())
