"""Timesteps that the caller declares, checked asynchronously on an accelerator.

Values of all steps are computed at once from the declared timesteps. A wrong declaration would give wrong images, so a
difference is a StateError. It is raised when a block of several calls is left, or after the last declared step. Where
each call has a block of its own, it is raised as soon as the device's answer is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_compile.errors import StateError
from moeca_compile.graph.nowait import Flag, upload


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The timesteps of some calls beside the declared ones, float64, one element for each element that came.

    Attributes:
        steps: the call's number, for each element.
        received: what the model received.
        declared: what was declared for the call.
        same: whether both are equal; the device may still compute it.
    """

    steps: tuple[int, ...]
    received: torch.Tensor
    declared: torch.Tensor
    same: Flag


class DeclaredTimesteps:
    """The declared timesteps of a named stream, one for each call."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(timesteps)
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._comparisons: list[_Comparison] = []

    def at(self, step: int, value: torch.Tensor) -> float | None:
        """The declared timestep of call `step`, which received `value`; None: none was declared for it."""
        if step >= len(self.timesteps) or not value.numel():
            return None
        self._pending.append((step, value.detach().clone()))
        return self.timesteps[step]

    def check(self) -> None:
        """Compare the timesteps of the calls since the last check; called when a block of calls is left.

        Raises:
            StateError: a call received another timestep than was declared.
        """
        wait = False
        if self._pending:
            self._comparisons.append(self._compare())
            last_step = self._pending[-1][0]
            wait = len(self._pending) > 1 or last_step + 1 == len(self.timesteps)
            self._pending.clear()
        while self._comparisons and (wait or self._comparisons[0].same.ready()):
            comparison = self._comparisons.pop(0)
            if not comparison.same.holds():
                self._comparisons.clear()
                raise StateError(_difference(comparison))

    def _compare(self) -> _Comparison:
        like = self._pending[0][1]
        steps = tuple(step for step, value in self._pending for _ in range(value.numel()))
        received = torch.cat([value.reshape(-1).double() for _, value in self._pending])
        declared = torch.tensor([self.timesteps[step] for step in steps], dtype=torch.float64)
        declared = upload(declared.to(like.dtype).double(), like.device)  # rounded as the received values are
        return _Comparison(steps, received, declared, Flag((received == declared).all()))


def _difference(comparison: _Comparison) -> str:
    first = int((comparison.received != comparison.declared).nonzero()[0])
    return (
        f"call {comparison.steps[first] + 1} came with timestep {float(comparison.received[first]):g}, but the "
        f"trajectory declared {float(comparison.declared[first]):g} (timesteps=...): its result and those after it are "
        "wrong. Declare the timesteps that the model receives, one a call, or leave them out"
    )
