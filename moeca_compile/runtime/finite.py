"""Whether what a step gave was finite."""

from __future__ import annotations

import torch

from moeca_compile.runtime.nowait import Flag


class Finite(Flag):
    """The answer for the output of one step."""

    def __init__(self, output: torch.Tensor, step: int) -> None:
        self.step = step
        super().__init__(torch.isfinite(output).all())
