"""A prologue for many timesteps at once: its graph mapped over a leading axis of the timestep by `torch.vmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import Executable


def lower_over_steps(variant: Variant, timesteps: Sequence[int]) -> Executable:
    """Not compiled: it runs once a trajectory, is all matrix multiplications, and would be compiled for each number of
    steps.

    Args:
        variant: a prologue.
        timesteps: which of its inputs are timesteps; they come as [steps, *shape], and every result has that axis too.

    Raises:
        LoweringError: (when run) an operator that can't be mapped.
    """
    axes = [0 if i in timesteps else None for i in range(len(variant.takes) + len(variant.hoists))]

    def once(*args: Any) -> Sequence[torch.Tensor]:
        results: Sequence[torch.Tensor] = torch.fx.Interpreter(variant.gm).run(*args)
        return tuple(results)

    mapped = torch.vmap(once, in_dims=tuple(axes), randomness="error")

    def run(args: Sequence[Any]) -> Sequence[torch.Tensor]:
        try:
            return [one.contiguous() for one in mapped(*args)]
        except RuntimeError as error:
            raise LoweringError(f"{variant.name} can't be computed for many timesteps at once: {error}") from error

    return run
