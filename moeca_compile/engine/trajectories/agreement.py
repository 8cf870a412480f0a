"""What the ranks of a spread model agree on. A step with collectives must be one on all ranks, or none goes on.

A static schedule is the same everywhere. But a rank alone may have no state for a step, since its weights were changed
or its samples aren't finite; and an adaptive schedule decides by a rank's own samples. So before each step the ranks
compare what they would run, in one reduction of four numbers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.runtime.driver import Agreed


class Agreement:
    """Decides as one for all ranks that share the collectives of a model.

    Args:
        groups: names of their process groups.
        device: where the groups reduce.
    """

    def __init__(self, groups: tuple[str, ...], device: torch.device) -> None:
        self._groups, self._device = groups, device

    def __call__(self, is_cold: bool, row: int, drift: float | None) -> Agreed:
        """Compare the ranks' next step; waits for the device.

        Args:
            is_cold: this rank has no state for the step.
            row: a number for what this rank would run; equal for equal rows.
            drift: of an adaptive schedule; None: none was measured on this rank.
        """
        from torch.distributed import get_rank

        unmeasured, unknown = -math.inf, math.inf  # a drift that isn't finite asks for a full step
        figure = unmeasured if drift is None else drift if math.isfinite(drift) else unknown
        cold, highest, lowest, largest = self._largest([get_rank() + 1 if is_cold else 0, row, -row, figure])
        return Agreed(int(cold) - 1 if cold else None, highest != -lowest, None if largest == unmeasured else largest)

    def _largest(self, figures: Sequence[float]) -> list[float]:
        from torch.distributed import ReduceOp, all_reduce

        tensor = torch.tensor(figures, dtype=torch.float64, device=self._device)
        for name in self._groups:
            all_reduce(tensor, ReduceOp.MAX, group=_group(name))
        return tensor.tolist()


def agreement_of(gm: GraphModule, args: Sequence[Any]) -> Agreement | None:
    """For the ranks that share the collectives of a graph; None: it has none, or their groups have one rank each.
    `args`: of a call."""
    nodes = filter(fx.is_collective, gm.graph.nodes)
    names = {argument for node in nodes for argument in node.args if isinstance(argument, str)}
    device = next((value.device for value in args if isinstance(value, torch.Tensor)), torch.device("cpu"))
    return _agreement(names, device)


def agreement_of_weights(weights: Iterable[torch.Tensor]) -> Agreement | None:
    """For the ranks over which weights are spread (DTensors); None: there are none.

    The collectives of a model that isn't captured are unknown otherwise. Ranks without spread weights may each draw
    samples of their own.
    """
    meshes = {mesh for weight in weights if (mesh := getattr(weight, "device_mesh", None)) is not None}
    names = {group.group_name for mesh in meshes for group in mesh.get_all_groups()}
    kinds = {mesh.device_type for mesh in meshes}
    return _agreement(names, torch.device(kinds.pop() if kinds else "cpu"))


def _agreement(names: set[str], device: torch.device) -> Agreement | None:
    groups = tuple(sorted(name for name in names if _is_shared(name)))
    return Agreement(groups, device) if groups else None


def _is_shared(name: str) -> bool:
    """Whether it is a group of several ranks. A collective's arguments are names of reductions too."""
    try:
        return bool(_group(name).size() > 1)
    except (RuntimeError, ValueError):
        return False


def _group(name: str) -> Any:
    """The process group that collectives of a graph name."""
    distributed: Any = importlib.import_module("torch.distributed.distributed_c10d")
    return distributed._resolve_process_group(name)
