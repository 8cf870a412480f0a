"""What the ranks of a spread model agree on. A step with collectives must be one on all ranks, or none goes on.

A static schedule is the same everywhere. Two decisions depend on a rank's own samples: which row an adaptive schedule
runs, and whether state that isn't finite is dropped. Both are made by one figure, reduced over the ranks.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.nowait import Flag


class Agreement:
    """Decides as one for all ranks that share the collectives of a graph.

    Args:
        groups: names of their process groups.
        device: where the groups reduce.
    """

    def __init__(self, groups: tuple[str, ...], device: torch.device) -> None:
        self._groups, self._device = groups, device

    def largest(self, figure: float | None) -> float | None:
        """The largest of the ranks' figures; None: none was measured, on any rank."""
        return None if figure is None else self._reduced(figure)

    def all(self, finite: bool | Flag) -> bool:
        """Whether it holds on all ranks; waits for the device."""
        holds = finite if isinstance(finite, bool) else finite.holds()
        return self._reduced(float(not holds)) == 0.0

    def _reduced(self, figure: float) -> float:
        from torch.distributed import ReduceOp, all_reduce

        tensor = torch.tensor(figure, dtype=torch.float32, device=self._device)
        for name in self._groups:  # the groups of a mesh: after each of its dimensions all have it
            all_reduce(tensor, ReduceOp.MAX, group=_group(name))
        return float(tensor)


def agreement_of(gm: GraphModule, args: Sequence[Any]) -> Agreement | None:
    """For the ranks that share the collectives of a graph; None: it has none, or their groups have one rank each.
    `args`: of a call."""
    nodes = filter(fx.is_collective, gm.graph.nodes)
    names = {argument for node in nodes for argument in node.args if isinstance(argument, str)}
    groups = tuple(sorted(name for name in names if _is_shared(name)))
    device = next((value.device for value in args if isinstance(value, torch.Tensor)), torch.device("cpu"))
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
