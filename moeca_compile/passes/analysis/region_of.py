"""Nodes -> Region: what kind they are by their anchors, what they are called by their weights, what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from moeca_compile.dtypes import name_of
from moeca_compile.graph import fx
from moeca_compile.graph.regions import Region
from moeca_compile.passes.facts import Facts


def region_of(
    body: Sequence[Node], cuts: Sequence[Node], facts: Facts, kind: str = "", key: str = "", bases: Sequence[Node] = ()
) -> Region:
    """The region of the nodes `body`, in graph order, with its outputs at `cuts`.

    Kind and key are found if not given. `bases`: the nodes that the outputs are kept relative to, one each or none.
    """
    macs = facts.macs
    weights = {one.name: one.label for one in facts.inputs if one.is_weight}
    inside = {node.name for node in body}
    attention = tuple(a for a in facts.attention if a.node in inside)
    experts = tuple(e for e in facts.experts if e.node in inside)
    routers = tuple(r for r in facts.routers if inside.intersection(r.steers))
    routed = experts or any(r.choice != "head" for r in routers)
    found = "span" if attention and routed else "attention" if attention else "experts" if routed else "mlp"
    key = key or _key(body, weights) or fx.module_path(cuts[0]) or found
    values = [fx.need(cut) for cut in cuts]
    return Region(
        key=key,
        kind=kind or found,
        layer=next((int(part) for part in key.split(".") if part.isdigit()), -1),
        outputs=tuple(cut.name for cut in cuts),
        body=tuple(node.name for node in body),
        shapes=tuple(tuple(v.shape) for v in values),
        dtypes=tuple(name_of(v.dtype) for v in values),
        devices=tuple(str(v.device) for v in values),
        parameters=_parameters(body, weights),
        macs=sum(macs.get(node.name, 0) for node in body),
        state_bytes=sum(v.numel() * v.element_size() for v in values),
        experts=experts,
        attention=attention,
        routers=routers,
        bases=tuple(base.name for base in bases),
    )


def _parameters(body: Sequence[Node], weights: dict[str, str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = {}
    for node in body:
        for source in node.all_input_nodes:
            origin = fx.strip(source, fx.is_view_or_part)
            if origin.name in weights:
                found[weights[origin.name]] = fx.shape(origin)
    return tuple(found.items())


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
