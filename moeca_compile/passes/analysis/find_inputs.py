"""Which input is the timestep, which the latent, and what each node depends on.

The timestep is the input of at most one dimension that reaches both a sine and a cosine without meeting a matmul; of
several (guidance, frame rate) the one whose name says so, else the first. The latent is the largest floating-point
input that isn't a weight, with preference for one whose sizes an output has, and among equals (a picture to edit) again
for the name; models that take and give a list of tensors have several, and the clock watches the first. The other
inputs are the condition: prompts, labels, masks, positions, which stay the same in a trajectory.

Every node is `const`, `condition` (depends on the condition only, so it is the same in every step of a trajectory),
`step` (depends on the timestep, not on the latent) or `latent`.
Does nothing where the graph has no input but weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from torch.fx import GraphModule, Node

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.passes.facts import Facts, Roles

LEVELS = ("const", "condition", "step", "latent")
CONDITION, STEP, LATENT = 1, 2, 3
# Names decide between inputs that their use doesn't tell apart, and never else.
_TIME = r"t|time_?steps?|times?|sigmas?"
_LATENT = r"x|z|x_?t|latents?|hidden_states|samples?"
_WAVES = ({aten.sin.default}, {aten.cos.default})


def find_inputs(gm: GraphModule, facts: Facts) -> Facts:
    own = [
        node
        for node, one in zip(fx.placeholders(gm), facts.inputs, strict=True)
        if not one.is_weight and fx.tensor(node) is not None
    ]
    labels = {one.name: one.label for one in facts.inputs}
    clocks = [node for node in own if fx.need(node).dim() <= 1 and _reaches_waves(node)]
    timestep = max(clocks, key=lambda node: _is_called(_TIME, labels[node.name]), default=None)  # the first of equals
    latents = _latents(gm, [node for node in own if node is not timestep], labels)
    condition = tuple(node.name for node in own if node is not timestep and node not in latents)
    roles = Roles(timestep.name if timestep else "", latents[0].name if latents else "", condition)
    levels = {
        **dict.fromkeys(condition, CONDITION),
        roles.timestep: STEP,
        **{node.name: LATENT for node in latents},
    }
    return replace(facts, roles=roles, dependence=_dependence(gm, levels))


def _is_called(names: str, label: str) -> bool:
    return re.fullmatch(names, label.rpartition(".")[2]) is not None


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


def _latents(gm: GraphModule, own: list[Node], labels: dict[str, str]) -> list[Node]:
    floats = [node for node in own if fx.need(node).is_floating_point() and fx.need(node).dim() >= 2]
    outputs = [fx.shape(node) for node in fx.nodes_of(fx.output_node(gm).args[0])]

    def rank(node: Node) -> tuple[int, int, bool]:
        shape = fx.shape(node)
        same_rank = [out for out in outputs if len(out) == len(shape)]
        alike = [sum(a == b for a, b in zip(shape, out, strict=True)) for out in same_rank]
        return max(alike, default=0), math.prod(shape), _is_called(_LATENT, labels[node.name])

    if not floats:
        return []
    best = max(floats, key=rank)
    like_it = [node for node in floats if node is not best and fx.shape(node) == fx.shape(best)]
    return [best, *like_it[: max(0, outputs.count(fx.shape(best)) - 1)]]


def _dependence(gm: GraphModule, levels: dict[str, int]) -> dict[str, str]:
    level: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            level[node] = levels.get(node.name, 0)
        else:
            level[node] = max((level[source] for source in node.all_input_nodes), default=0)
    return {node.name: LEVELS[rank] for node, rank in level.items()}
