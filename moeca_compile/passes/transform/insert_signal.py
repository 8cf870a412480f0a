"""The figure that an adaptive schedule decides by: how far this step's signal is from its forecast, for each sample.

The forecast is the one that cached regions get, from the full steps before: the figure says how wrong they may be, by a
value that is known.
Does nothing where the schedule isn't adaptive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from moeca_compile.graph import fx
from moeca_compile.graph.variant import MODEL, Slot
from moeca_compile.passes.facts import RewriteRequest
from moeca_compile.passes.partial.item_state import State, forecast, updated
from moeca_compile.passes.transform.inline import inline
from moeca_compile.passes.transform.ports import Ports
from moeca_compile.schedule import Action


def insert_signal(gm: GraphModule, request: RewriteRequest) -> GraphModule:
    signal = request.facts.regions.signal
    if signal is None or not any(slot.slot is Slot.FIGURE for slot in request.layout):
        return gm
    ports = Ports(gm, request.layout, len(request.facts.regions))
    full = all(act is Action.COMPUTE for act in request.row)
    state = {slot: node for slot, node in ports.of(MODEL, 0).items() if slot is not Slot.FIGURE}
    (watched,) = fx.resolve(gm, [signal.node])
    with gm.graph.inserting_before(fx.output_node(gm)):
        after = inline(gm, measure, signal=watched, now=ports.now(), order=request.order, full=full, state=state)
    for name, node in after.items():
        ports.write(MODEL, 0, Slot(name), node)
    ports.finish()
    fx.resort(gm)
    return gm


def measure(signal: Tensor, now: Tensor, order: int, full: bool, state: State) -> dict[str, Tensor]:
    """`signal` [B, ..]; state: y [B, M], at [B] and so on (`partial/item_state.py`).

    Returns figure float32 [B] and, at a full step, the state after it.
    """
    x, has_history = signal.flatten(1), state[Slot.AT] > 0
    error = (x - forecast(state, now, order)).abs().float().mean(1)
    figure = torch.where(has_history, error / x.abs().float().mean(1).clamp_min(1e-12), 0.0)
    after = updated(state, x, torch.ones_like(has_history), has_history, now, order) if full else {}
    return {Slot.FIGURE: figure, **after}
