"""Which input is the timestep, which the latent, and what each node depends on.

The timestep is the input of at most one dimension that reaches both a sine and a cosine without meeting a matmul that
adds products up; of several (guidance, frame rate) the one whose name says so, else the first. An input of more
dimensions, such as one timestep for each token, must be embedded too: a matmul reads its waves, and no other input
comes in before. (Positions of a rotary embedding reach waves, but these are multiplied with queries and keys.) A model
may have more timesteps, for example of its audio: inputs that are embedded and have a word of time in their names.

The latent is the largest floating-point input that isn't a weight, with preference for one whose sizes an output has.
If none has an output's batch and number of dimensions, one with as many numbers comes first: a latent that the caller
cut into patches. Among equals (a picture to edit) again the name decides. A model that gives several tensors has a
latent for each (a list of them, video and audio): the inputs of their shapes. The clock watches the first. The other
inputs are the condition: prompts, labels, masks, positions, which stay the same in a trajectory. A cache that the model
overwrites is none of these; what is computed from it changes with the latent. In such a model a vector may also be the
positions of tokens in the cache, so a timestep must be embedded.

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
_TIME_WORD = r"t|time|time_?steps?|sigmas?|noise|tau"
_LATENT = r"x|z|x_?t|latents?|hidden_states|samples?"
_WAVES = ({aten.sin.default}, {aten.cos.default})


def find_inputs(gm: GraphModule, facts: Facts) -> Facts:
    arguments: list[Node] = []
    labels: dict[str, str] = {}
    for node, entry in zip(fx.placeholders(gm), facts.inputs, strict=True):
        labels[node.name] = entry.label
        if not entry.is_weight and fx.tensor(node) is not None and node.name not in facts.caches:
            arguments.append(node)
    timesteps = _timesteps(gm, arguments, labels, only_embedded=bool(facts.caches))
    results = [fx.shape(node) for node in fx.nodes_of(fx.output_node(gm).args[0])]
    outputs = results[: len(results) - len(facts.caches)]
    latents = _latents([node for node in arguments if node not in timesteps], outputs, labels)
    levels = dict.fromkeys(facts.caches, LATENT)
    condition: list[str] = []
    for node in arguments:
        levels[node.name] = STEP if node in timesteps else LATENT if node in latents else CONDITION
        if levels[node.name] == CONDITION:
            condition.append(node.name)
    names = [node.name for node in timesteps]
    roles = Roles(names[0] if names else "", latents[0].name if latents else "", tuple(condition), tuple(names[1:]))
    return replace(facts, roles=roles, dependence=_dependence(gm, levels))


def _timesteps(gm: GraphModule, arguments: list[Node], labels: dict[str, str], only_embedded: bool) -> list[Node]:
    """The timestep inputs, the one that schedules go by first. `only_embedded`: vectors must be embedded too."""
    waving = [node for node in arguments if _reaches_waves(node)]
    embedded = _embedded(gm, arguments, waving)
    if only_embedded:
        waving = [node for node in waving if node in embedded]
    named = [node for node in waving if node in embedded and has_word_of_time(labels[node.name])]
    vectors = [node for node in waving if fx.need(node).dim() <= 1]
    candidates = [node for node in waving if node in vectors or node in named]
    candidates = candidates or [node for node in waving if node in embedded]

    def rank(node: Node) -> tuple[bool, bool]:
        return _is_called(_TIME, labels[node.name]), node in vectors

    timestep = max(candidates, key=rank, default=None)  # the first of equals
    return [] if timestep is None else [timestep, *(node for node in named if node is not timestep)]


def has_word_of_time(label: str) -> bool:
    """Whether an input's name has a word that timesteps are called by, as `audio_timestep`."""
    words = label.rpartition(".")[2].lower().split("_")
    return any(re.fullmatch(_TIME_WORD, word) for word in words)


def _is_called(names: str, label: str) -> bool:
    return re.fullmatch(names, label.rpartition(".")[2]) is not None


def _embedded(gm: GraphModule, arguments: list[Node], candidates: list[Node]) -> set[Node]:
    """The candidates whose waves, together with no other input, are multiplied with a matrix."""
    source: dict[Node, Node | None] = {node: node for node in arguments}  # the only one that a node depends on
    waved, embedded = set[Node](), set[Node]()
    for node in gm.graph.nodes:
        inputs = {source[above] for above in node.all_input_nodes if above in source}
        if not inputs:
            continue
        only = source[node] = inputs.pop() if len(inputs) == 1 else None
        if only is None or only not in candidates:
            continue
        has_waves = not waved.isdisjoint(node.all_input_nodes)
        if has_waves and node.target in fx.MATMULS:
            embedded.add(only)
        if has_waves or any(node.target in wave for wave in _WAVES):
            waved.add(node)
    return embedded


def _reaches_waves(start: Node) -> bool:
    """Whether a sine and a cosine lie below, before any matmul: a timestep embedding, not a position in a sequence."""
    seen, front, waves = {start}, [start], set()
    while front:
        for user in front.pop().users:
            waves.add(user.target)
            if user not in seen and (user.target not in fx.MATMULS or _is_outer_product(user)):
                seen.add(user)
                front.append(user)
    return all(wave & waves for wave in _WAVES)


def _is_outer_product(matmul: Node) -> bool:
    """Whether each result is one product: Gaussian Fourier features multiply a timestep with each frequency so."""
    if matmul.target not in (aten.linear.default, aten.matmul.default, aten.mm.default):
        return False
    left = matmul.args[0]
    return isinstance(left, Node) and fx.shape(left)[-1:] == (1,)


def _latents(arguments: list[Node], outputs: list[tuple[int, ...]], labels: dict[str, str]) -> list[Node]:
    floats = [node for node in arguments if fx.need(node).is_floating_point() and fx.need(node).dim() >= 2]

    def rank(node: Node) -> tuple[int, bool, int, bool]:
        shape, size = fx.shape(node), math.prod(fx.shape(node))
        same_batch = [out for out in outputs if len(out) == len(shape) and out[0] == shape[0]]
        alike = [sum(a == b for a, b in zip(shape, out, strict=True)) for out in same_batch]
        is_reshaped = size in map(math.prod, outputs)
        return max(alike, default=0), is_reshaped, size, _is_called(_LATENT, labels[node.name])

    if not floats:
        return []
    best = max(floats, key=rank)
    latents = [best]
    for shape in dict.fromkeys([fx.shape(best), *outputs]):
        alike = [node for node in floats if fx.shape(node) == shape]
        alike.sort(key=lambda node: node is not best)
        latents += [node for node in alike[: outputs.count(shape)] if node is not best]
    return latents


def _dependence(gm: GraphModule, levels: dict[str, int]) -> dict[str, str]:
    level: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            level[node] = levels.get(node.name, 0)
        else:
            level[node] = max((level[source] for source in node.all_input_nodes), default=0)
    return {node.name: LEVELS[rank] for node, rank in level.items()}
