"""Which input is the timestep, which the latent, and what each node depends on.

The timestep is the input of at most one dimension that reaches both a sine and a cosine without meeting a matmul. The
latent is the largest floating-point input that isn't a weight, with preference for one whose sizes an output has.
Every node is `const`, `step` (depends on timestep or condition, not on the latent) or `latent`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile import fx
from moeca_compile.fx import aten
from moeca_compile.passes.context import Context, Roles

_WAVES = ({aten.sin.default}, {aten.cos.default})


def find_inputs(gm: GraphModule, ctx: Context) -> Context:
    own = [
        node
        for node, one in zip(fx.placeholders(gm), ctx.inputs, strict=True)
        if not one.is_weight and fx.tensor(node) is not None
    ]
    timestep = next((node for node in own if fx.need(node).dim() <= 1 and _reaches_waves(node)), None)
    latent = _latent(gm, [node for node in own if node is not timestep])
    condition = tuple(node.name for node in own if node not in (timestep, latent))
    roles = Roles(timestep.name if timestep else "", latent.name if latent else "", condition)
    return replace(ctx, roles=roles, dependence=_dependence(gm, roles))


def _reaches_waves(start: Node) -> bool:
    """Whether a sine and a cosine lie below, before any matmul: a timestep embedding, not a position in a sequence."""
    seen, front, waves = {start}, [start], set()
    while front:
        for user in front.pop().users:
            waves.add(user.target)
            if user not in seen and user.target not in fx.MATMULS:
                seen.add(user)
                front.append(user)
    return all(wave & waves for wave in _WAVES)


def _latent(gm: GraphModule, own: list[Node]) -> Node | None:
    floats = [node for node in own if fx.need(node).is_floating_point() and fx.need(node).dim() >= 2]
    outputs = [fx.shape(node) for node in fx.nodes_of(fx.output_node(gm).args[0])]

    def rank(node: Node) -> tuple[int, int]:
        shape = fx.shape(node)
        same_rank = [out for out in outputs if len(out) == len(shape)]
        alike = [sum(a == b for a, b in zip(shape, out, strict=True)) for out in same_rank]
        return max(alike, default=0), math.prod(shape)

    return max(floats, key=rank, default=None)


def _dependence(gm: GraphModule, roles: Roles) -> tuple[tuple[str, str], ...]:
    order = ("const", "step", "latent")
    level: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            level[node] = (
                2 if node.name == roles.latent else 1 if node.name in (roles.timestep, *roles.condition) else 0
            )
        else:
            level[node] = max((level[source] for source in node.all_input_nodes), default=0)
    return tuple((node.name, order[rank]) for node, rank in level.items())
