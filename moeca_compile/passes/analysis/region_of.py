"""Nodes -> Region: what kind they are by their anchors, what they are called by their weights, what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch.fx import Node

from moeca_compile.dtypes import name_of
from moeca_compile.graph import fx
from moeca_compile.graph.regions import Cut, Region
from moeca_compile.passes.facts import Facts


def region_of(
    body: Sequence[Node], outputs: Sequence[Node], facts: Facts, kind: str = "", key: str = "",
    bases: Sequence[Node] = (),
) -> Region:  # fmt: skip
    """The region of the nodes `body`, in graph order, with these outputs.

    Kind and key are found if not given. `bases`: the nodes that the outputs are kept relative to, one each or none.
    """
    macs = facts.macs
    weights = {entry.name: entry.label for entry in facts.inputs if entry.is_weight}
    inside = {node.name for node in body}
    attention = tuple(a for a in facts.attention if a.node in inside)
    experts = tuple(e for e in facts.experts if e.node in inside)
    routers = tuple(r for r in facts.routers if inside.intersection(r.steers))
    routed = experts or any(r.choice != "head" for r in routers)
    kind_of_anchors = "span" if attention and routed else "attention" if attention else "experts" if routed else "mlp"
    key = key or _key(body, weights) or fx.module_path(outputs[0]) or kind_of_anchors
    return Region(
        key=key,
        kind=kind or kind_of_anchors,
        layer=next((int(part) for part in key.split(".") if part.isdigit()), -1),
        cuts=tuple(_cut(*pair) for pair in itertools.zip_longest(outputs, bases)),
        body=tuple(node.name for node in body),
        parameters=_parameters(body, weights),
        macs=sum(macs.get(node.name, 0) for node in body),
        experts=experts,
        attention=attention,
        routers=routers,
    )


def _cut(output: Node, base: Node | None) -> Cut:
    value = fx.need(output)
    size = value.numel() * value.element_size()
    base_name = base.name if base is not None else ""
    return Cut(output.name, tuple(value.shape), name_of(value.dtype), str(value.device), size, base_name)


def _parameters(body: Sequence[Node], weights: dict[str, str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shapes = {}
    for node in body:
        for source in node.all_input_nodes:
            origin = fx.strip(source, fx.is_view_or_part)
            if origin.name in weights:
                shapes[weights[origin.name]] = fx.shape(origin)
    return tuple(shapes.items())


def _key(body: Sequence[Node], weights: dict[str, str]) -> str:
    """The longest dotted prefix of the modules whose weights the region multiplies by."""
    multiplies = [node for node in body if node.target in fx.MATMULS or fx.is_experts(node)]
    modules = [label.rpartition(".")[0].split(".") for label, _ in _parameters(multiplies, weights)]
    prefix: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)
