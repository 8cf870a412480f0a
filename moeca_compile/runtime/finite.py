"""Whether what a step gave was finite, asked without waiting for an accelerator that is still at it."""

from __future__ import annotations

import torch


class Finite:
    """The answer for the output of one step, which arrives when its device gets there."""

    def __init__(self, output: torch.Tensor, step: int) -> None:
        self.step = step
        flag = torch.isfinite(output).all()
        self._arrived: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            flag = flag.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._flag = flag

    def ready(self) -> bool:
        """Whether `holds` would answer at once."""
        return self._arrived is None or self._arrived.query()

    def holds(self) -> bool:
        """Wait for the answer."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
