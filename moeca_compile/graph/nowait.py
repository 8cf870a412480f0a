"""To and from an accelerator without waiting for it."""

from __future__ import annotations

import torch


def upload(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device."""
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


class Flag:
    """A yes or no that a device computes (`value`, bool, one element): asked now, read when the device got there."""

    def __init__(self, value: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            value = value.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._value = value

    def ready(self) -> bool:
        """Whether `holds` would answer at once."""
        return self._arrived is None or self._arrived.query()

    def holds(self) -> bool:
        """Wait for the answer."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
