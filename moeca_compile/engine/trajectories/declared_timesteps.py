"""Timesteps on an accelerator, at the caller's word: nobody waits to read them, what came is compared on the device.

The word is needed for what is computed from the timesteps of all steps at once. A wrong one would give wrong images, so
it is an error: raised when a trajectory's block of several calls is left, or after the last of its steps; where each
call has a block of its own, as soon as the device has told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_compile.errors import StateError
from moeca_compile.graph.nowait import Flag, upload


@dataclass(frozen=True, slots=True)
class _Came:
    """What some calls came with, one element a row [calls], beside what was told for them; and whether it is that."""

    steps: tuple[int, ...]
    came: torch.Tensor
    told: torch.Tensor
    same: Flag


class DeclaredTimesteps:
    """The timesteps of a named stream's calls, one a call."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(timesteps)
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._asked: list[_Came] = []

    def at(self, step: int, value: torch.Tensor) -> float | None:
        """The timestep of call `step`, which came with `value`; None: nothing was told for it."""
        if step >= len(self.timesteps) or not value.numel():
            return None
        self._pending.append((step, value.detach().clone()))
        return self.timesteps[step]

    def settle(self) -> None:
        """A block of calls was left.

        Raises:
            StateError: other timesteps came.
        """
        if self._pending:
            self._asked.append(self._ask())
            wait = len(self._pending) > 1 or self._pending[-1][0] + 1 == len(self.timesteps)
            self._pending.clear()
        else:
            wait = False
        while self._asked and (wait or self._asked[0].same.ready()):
            one = self._asked.pop(0)
            if not one.same.holds():
                self._asked.clear()
                raise StateError(_difference(one))

    def _ask(self) -> _Came:
        like = self._pending[0][1]
        steps = tuple(step for step, value in self._pending for _ in range(value.numel()))
        came = torch.cat([value.reshape(-1).double() for _, value in self._pending])
        told = torch.tensor([self.timesteps[step] for step in steps], dtype=torch.float64)
        told = upload(told.to(like.dtype).double(), like.device)  # as it would have come
        return _Came(steps, came, told, Flag((came == told).all()))


def _difference(found: _Came) -> str:
    at = int((found.came != found.told).nonzero()[0])
    return (
        f"call {found.steps[at] + 1} came with timestep {float(found.came[at]):g}, but the trajectory was told "
        f"{float(found.told[at]):g} (timesteps=...): its result and those after it are wrong. Tell the timesteps that "
        "the model receives, one a call, or leave them out"
    )
