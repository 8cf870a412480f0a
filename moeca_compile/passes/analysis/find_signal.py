"""What an adaptive schedule watches: the stream that enters the first cached region, as its first matmul reads it.

Before: the regions.  After: `regions.signal`, where there is one. It is computed in every row, for it costs no matmul,
and unlike the latent it holds what the timestep does to the stream.
Does nothing where no stream with a batch enters the first region.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moeca_compile.dtypes import name_of
from moeca_compile.graph import fx
from moeca_compile.graph.regions import Value
from moeca_compile.passes.facts import Facts


def find_signal(gm: GraphModule, facts: Facts) -> Facts:
    depends = facts.dependence
    nodes = {node.name: node for node in gm.graph.nodes}
    batch = fx.shape(nodes[facts.roles.latent])[:1] if facts.roles.latent else ()
    for region in facts.regions.regions[:1]:
        heavy = next((nodes[name] for name in region.body if nodes[name].target in fx.MATMULS), None)
        for source in heavy.all_input_nodes if heavy is not None else ():
            shape = fx.shape(source)
            if depends.get(source.name) == "latent" and len(shape) > 1 and shape[:1] == batch:
                signal = Value(source.name, shape, name_of(fx.need(source).dtype))
                return replace(facts, regions=replace(facts.regions, signal=signal))
    return facts
