"""An attention or an mlp whose tokens age one by one: some are recomputed, the others forecast, each from its own age.

A PARTIAL attention asks for the chosen tokens only; their keys and values are put among the cached ones of all others.
"""

from __future__ import annotations

from moeca_compile.graph import fx
from moeca_compile.graph.variant import KEYS
from moeca_compile.passes.partial.parts import Parts, copies
from moeca_compile.passes.partial.slice_tokens import Slice
from moeca_compile.schedule import Action, Partial


def insert_tokens(parts: Parts, mark: fx.Mark) -> None:
    region, info = parts.info(mark.region)
    act, output = mark.action, parts.nodes[region.outputs[0]]
    if act is Action.COMPUTE:
        parts.update_tokens(mark.region, 0, output, None, False)
        for slot, key in zip(KEYS, info.keys, strict=False):
            parts.ports.write(mark.region, 0, slot, parts.nodes[key.node])
        return
    if not (isinstance(act, Partial) and act.rho):
        output.replace_all_uses_with(parts.update_tokens(mark.region, 0, None, None, copies(act)))
        return
    chosen = parts.chosen(mark.region, act.rho)
    body = [parts.nodes[name] for name in info.body]
    with parts.gm.graph.inserting_before(fx.output_node(parts.gm)):
        part = Slice(parts.gm, info, chosen)
        start = body.index(parts.nodes[region.attention[0].node]) if info.keys else len(body)
        part.follow(body[:start])
        keys = {}
        for slot, key in zip(KEYS, info.keys, strict=False):
            node, full = parts.nodes[key.node], parts.ports.read(mark.region, 0, slot)
            keys[node] = part.put(full, part.made[node], part.axes[key.node].dim)
            parts.ports.write(mark.region, 0, slot, keys[node])
        part.follow(body[start:], keys)
    users = list(output.users)
    value = parts.update_tokens(mark.region, 0, part.made[output], chosen, False)
    for user in users:
        user.replace_input_with(output, value)
