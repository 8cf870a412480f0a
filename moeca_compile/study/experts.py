"""How much each expert's part of the output changes from step to step: numbers for whoever keeps branches apart.

Expert e of a layer contributes to token t the sum of g_tk y_tk over the slots k that are routed to e, gate weights g
included; where t isn't routed to e that is zero. The *drift* of e is how far this contribution at a step is from what
the steps before give, copied (`reuse`) or extrapolated (`forecast`), on an uncached trajectory (teacher-forced): a
token that changes its experts counts for both. What the sample suffers is another question (`study/stale.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_compile import fx
from moeca_compile.autocast import autocast_is
from moeca_compile.program import Program
from moeca_compile.regions import ExpertsInfo, Region
from moeca_compile.study.handle import Call

EVERY, RUN = 6, 3  # of so many steps the first few are looked at


@dataclass(frozen=True)
class ExpertDrift:
    """Root mean squares over tokens, channels and steps; `load`: the share of the layer's branches that are its own."""

    region: str
    layer: int
    expert: int
    load: float
    reuse: float
    forecast: float


class ExpertWatch:
    """Looks at the calls of one trajectory, the first that it sees."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers = [(region, info) for region in program.regions for info in region.experts]
        self._last: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        self._sums: dict[tuple[str, int], list[float]] = {}
        self._parts: dict[str, tuple[Region, int]] = {}
        self._streams: dict[str, int] = {}
        self._over = not self.layers

    def see(self, call: Call) -> None:
        """Take one call in."""
        step = call.record.step
        if self._over or call.program is not self.program:
            return
        if step < self._streams.get(call.stream, 0):
            self._over = True  # another trajectory
            return
        self._streams[call.stream] = step
        if step % EVERY >= RUN:
            return
        env = _values(self.program, call.args)
        for region, info in self.layers:
            parts = contributions(self.program, region, info, env)
            if parts is not None:
                self._take(region, info, call.stream, step, *parts)

    def _take(self, region: Region, info: ExpertsInfo, stream: str, step: int, parts: Tensor, counts: Tensor) -> None:
        kept = self._last.setdefault((info.node, stream), [])
        self._parts[info.node] = (region, len(parts))
        for expert, count in enumerate(counts.tolist()):
            self._sum(info.node, expert)[0] += count
        if len(kept) == 2 and [at for at, _ in kept] == [step - 1, step - 2]:
            (_, one), (_, two) = kept
            reuse = (parts - one).square().mean(dim=(1, 2)).tolist()
            forecast = (parts - 2 * one + two).square().mean(dim=(1, 2)).tolist()
            for expert in range(len(parts)):
                sums = self._sum(info.node, expert)
                sums[1] += reuse[expert]
                sums[2] += forecast[expert]
                sums[3] += 1
        self._last[info.node, stream] = [(step, parts), *kept][:2]

    def _sum(self, node: str, expert: int) -> list[float]:
        return self._sums.setdefault((node, expert), [0.0] * 4)

    def found(self) -> tuple[ExpertDrift, ...]:
        """One entry an expert, in graph order."""
        drifts = []
        for node, (region, experts) in self._parts.items():
            total = sum(self._sums[node, expert][0] for expert in range(experts))
            for expert in range(experts):
                load, reuse, forecast, count = self._sums[node, expert]
                drifts.append(
                    ExpertDrift(
                        region.key,
                        region.layer,
                        expert,
                        load / max(total, 1),
                        math.sqrt(reuse / max(count, 1)),
                        math.sqrt(forecast / max(count, 1)),
                    )
                )
        return tuple(drifts)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(one) for one in self.found()]


def _values(program: Program, args: Any) -> dict[torch.fx.Node, Any]:
    """Every node's value for a call with `args`."""
    gm = program.analysis.gm
    positions = {one.name: i for i, one in enumerate(program.analysis.context.inputs)}
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    with autocast_is(()), torch.no_grad():
        interpreter.run(*(args[positions[node.name]] for node in fx.placeholders(gm)))
    return interpreter.env


def contributions(
    program: Program, region: Region, info: ExpertsInfo, env: dict[torch.fx.Node, Any]
) -> tuple[Tensor, Tensor] | None:
    """[experts, tokens, channels] float32 and how many branches each expert has; None: the sum isn't by token."""
    gm = program.analysis.gm
    (node,) = fx.resolve(gm, (info.node,))
    (ids_node,) = fx.resolve(gm, (info.ids,))
    (output,) = fx.resolve(gm, region.outputs[:1])
    y, ids = env[node], env[ids_node]
    ids = ids.reshape(y.shape[:2])

    def outcome(of: Tensor) -> Tensor:
        """The region's output if the experts had given `of`."""
        values = {node: of}
        inside = set(region.body) | {output.name}
        interpreter = torch.fx.Interpreter(gm)
        for one in gm.graph.nodes:
            if one.name in inside and one is not node and any(source in values for source in one.all_input_nodes):
                interpreter.env = {source: values.get(source, env[source]) for source in one.all_input_nodes}
                values[one] = interpreter.run_node(one)
        return values[output] if output in values else env[output]

    with autocast_is(()), torch.no_grad():
        base = outcome(torch.zeros_like(y)).float()
        if base.numel() != y.shape[0] * y.shape[2]:
            return None
        gates = []
        for slot in range(y.shape[1]):  # the sum is linear in y: ones in one slot show that slot's gate
            ones = torch.zeros_like(y)
            ones[:, slot] = 1
            gates.append((outcome(ones).float() - base).reshape(y.shape[0], y.shape[2]).mean(dim=1))
        gated = torch.stack(gates, dim=1).unsqueeze(-1) * y.float()
        count = max(int(ids.max()) + 1, info.router.num_experts if info.router is not None else 0)
        parts = torch.stack([(gated * (ids == expert).unsqueeze(-1)).sum(dim=1) for expert in range(count)])
        return parts, ids.flatten().bincount(minlength=count)
