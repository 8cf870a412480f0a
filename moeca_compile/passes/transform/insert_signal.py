"""The figure that an adaptive schedule decides by: how far this step's signal is from its forecast, for each sample.

The forecast is the one that cached regions get, from the full steps before: the figure says how wrong they may be, by a
value that is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.graph.variant import Slot
from moeca_compile.passes.context import Context
from moeca_compile.passes.partial.kept import State, forecast, refreshed
from moeca_compile.passes.partial.parts import Parts
from moeca_compile.passes.transform.layout import MODEL
from moeca_compile.schedule import Action


def insert_signal(parts: Parts, ctx: Context) -> None:
    signal = ctx.regions.signal
    if signal is None or not parts.ports.has(MODEL, 0, Slot.FIGURE):
        return
    full = all(act is Action.COMPUTE for act in ctx.row)
    state = {name: slot for name, slot in parts.ports.of(MODEL, 0).items() if name is not Slot.FIGURE}
    after = parts.inline(
        measure, signal=parts.nodes[signal.node], now=parts.ports.now(), order=parts.order, full=full, state=state
    )
    for name, node in after.items():
        parts.ports.write(MODEL, 0, Slot(name), node)


def measure(signal: Tensor, now: Tensor, order: int, full: bool, state: State) -> dict[str, Tensor]:
    """`signal` [B, ..]; state: y [B, M], at [B] and so on (`kept`). Returns figure float32 [B] and, at a full step, the
    state after it."""
    x, known = signal.flatten(1), state[Slot.AT] > 0
    wrong = (x - forecast(state, now, order)).abs().float().mean(1)
    figure = torch.where(known, wrong / x.abs().float().mean(1).clamp_min(1e-12), 0.0)
    after = refreshed(state, x, torch.ones_like(known), known, now, order) if full else {}
    return {Slot.FIGURE: figure, **after}
