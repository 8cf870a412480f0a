"""All variants of a bundle as one graph: `If` on the number of the step, which is a state like the cached outputs.

For runtimes that want one file. The weights lie in the main graph, where all branches read them (inside a branch they
would be kept once more); all states go in and come out at every step, and what a branch doesn't write it hands on. At
step 0 no state is read, whatever its values and its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeca_compile.dtypes import DTYPES
from moeca_compile.graph.variant import SLOTS
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, DROPPED, FUSED_ROW, STEP
from moeca_compile.schedule.forecast import MAX_KEPT, Coefficients

Entry = tuple[int, Coefficients]


def fuse(models: Sequence[Any], data: Mapping[str, Any], entries: Sequence[Entry], period: int) -> Any:
    """One onnx_ir model of the variants' models, which it takes apart.

    Args:
        models: in the order of the manifest's variants, with their weights in the weights file already.
        data: the manifest's inputs, outputs, state and variants.
        entries: of the steps: the variant's number, and the coefficients of each region.
        period: how many of the last entries are repeated.
    """
    import onnx_ir as ir

    fused = _Fused(models[0], data)
    number, table = fused.position(entries, period)
    pairs = zip(models, data["variants"], strict=True)
    branches = [fused.branch(i, model, spec, table) for i, (model, spec) in enumerate(pairs)]
    graph = branches[-1]
    for i in reversed(range(len(branches) - 1)):
        parts = {"then_branch": branches[i], "else_branch": graph}
        node = ir.node("If", [fused.equal(number, i)], parts, num_outputs=len(fused.results), name=f"if_{i}")
        fused.name(node.outputs, f"if_{i}/")
        graph = ir.Graph([], node.outputs, nodes=[node], name=f"variants_from_{i}")
    return fused.finish(graph)


class _Fused:
    """The main graph in the making."""

    def __init__(self, first: Any, data: Mapping[str, Any]) -> None:
        import onnx_ir as ir

        self.ir, self.data = ir, data
        self.opsets: dict[str, int] = dict(first.graph.opset_imports)
        self.version = first.ir_version
        self.nodes: list[Any] = []
        self.at_start: Any = None  # whether this is step 0
        self.weights: dict[Any, Any] = {}
        self.states = [(one["name"], one["dtype"], one["shape"]) for one in data["state"]]
        self.inputs = {o["name"]: self.value(o["name"], o["dtype"], o["shape"]) for o in data["inputs"]}
        self.inputs[f"{STEP}_in"] = self.value(f"{STEP}_in", "int64", [1])
        self.inputs |= {f"{name}_in": self.value(f"{name}_in", dtype, shape) for name, dtype, shape in self.states}
        self.results = [(one["name"], one["dtype"], one["shape"]) for one in data["outputs"]]
        self.results += [(f"{name}_out", dtype, shape) for name, dtype, shape in self.states]
        if any(one["counts_dropped"] for one in data["variants"]):
            self.results.append((DROPPED, "int64", []))

    # -- small makers -----------------------------------------------------------------------------------------------

    def value(self, name: str, dtype: str, shape: Sequence[Any]) -> Any:
        kind = self.ir.TensorType(self.ir.DataType[DTYPES[dtype].onnx])
        return self.ir.Value(name=name, type=kind, shape=self.ir.Shape(shape))

    def name(self, values: Sequence[Any], prefix: str) -> None:
        """What a branch, or the whole, gives: its names, types and shapes."""
        for value, (name, dtype, shape) in zip(values, self.results, strict=True):
            like = self.value(name, dtype, shape)
            value.name, value.type, value.shape = f"{prefix}{name}", like.type, like.shape

    def constant(self, name: str, array: Any) -> Any:
        tensor = self.ir.tensor(array, name=f"{STEP}/{name}")
        value = self.ir.Value(name=tensor.name, const_value=tensor)
        value.type, value.shape = self.ir.TensorType(tensor.dtype), self.ir.Shape(array.shape)
        self.weights[value.name] = value
        return value

    def call(self, kind: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        node = self.ir.node(kind, inputs, attributes, name=f"{STEP}/{len(self.nodes)}")
        node.outputs[0].name = f"{STEP}/{kind}_{len(self.nodes)}"
        node.outputs[0].type = self.ir.TensorType(dtype or self.ir.DataType.INT64)
        self.nodes.append(node)
        return node.outputs[0]

    def equal(self, value: Any, number: int) -> Any:
        other = self.constant(f"number_{len(self.nodes)}", np.array(number, np.int64))
        return self.call("Equal", value, other, dtype=self.ir.DataType.BOOL)

    # -- the parts --------------------------------------------------------------------------------------------------

    def position(self, entries: Sequence[Entry], period: int) -> tuple[Any, Any]:
        """The number of this step's variant, int64 [], and its coefficients [regions, MAX_KEPT]."""
        step, end = self.inputs[f"{STEP}_in"], len(entries)
        axis = self.constant("axis", np.array([0], np.int64))
        self.at_start = self.equal(self.call("Squeeze", step, axis), 0)
        begin = self.constant("begin", np.array([end - period], np.int64))
        past = self.call("Mod", self.call("Sub", step, begin), self.constant("period", np.array([period], np.int64)))
        inside = self.call("Less", step, begin, dtype=self.ir.DataType.BOOL)
        entry = self.call("Where", inside, step, self.call("Add", past, begin))
        entry = self.call("Squeeze", entry, axis)
        variants = self.constant("variants", np.array([number for number, _ in entries], np.int64))
        regions = len(self.data["model"]["regions"])
        table = np.array([rows for _, rows in entries], np.float32).reshape(end, regions, MAX_KEPT)
        number = self.call("Gather", variants, entry, axis=0)
        coefficients = self.constant(COEFFICIENTS, table)
        return number, self.call("Gather", coefficients, entry, axis=0, dtype=self.ir.DataType.FLOAT)

    def branch(self, number: int, model: Any, spec: Mapping[str, Any], table: Any) -> Any:
        """A variant's graph inside the main one: its inputs, weights and coefficients are the main graph's."""
        ir, graph, prefix = self.ir, model.graph, f"{spec['name']}/"
        assert not model.functions
        self.opsets |= graph.opset_imports
        for value in list(graph.inputs):
            value.replace_all_uses_with(table if value.name == COEFFICIENTS else self.inputs[value.name])
        for value in list(graph.initializers.values()):
            value.replace_all_uses_with(self._weight(value, prefix))
        given = {value.name: value for value in graph.outputs}
        graph.outputs.clear()
        _rename(ir, graph, prefix)
        nodes = list(graph)
        graph.remove(nodes)
        results = []
        for name, _, _ in self.results:
            if name in given:
                results.append(given[name])
                continue
            node = self._zero() if name == DROPPED else self._kept(name.removesuffix("_out"), number, given)
            nodes.append(node)
            results.append(node.outputs[0])
        self.name(results, prefix)
        return ir.Graph([], results, nodes=nodes, name=spec["name"])

    def _weight(self, value: Any, prefix: str) -> Any:
        tensor = value.const_value
        place = (tensor.offset, tensor.length) if isinstance(tensor, self.ir.ExternalTensor) else tensor.tobytes()
        key = (place, tensor.dtype, tuple(tensor.shape))
        if key not in self.weights:
            name = f"{prefix}{value.name}"
            tensor.name = name
            own = self.ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
            own.type, own.shape = self.ir.TensorType(tensor.dtype), self.ir.Shape(tuple(tensor.shape))
            self.weights[key] = own
        return self.weights[key]

    def _kept(self, name: str, number: int, given: Mapping[str, Any]) -> Any:
        """A state that the variant doesn't write: handed on, or what the slot before it held. In variant 0, which runs
        at step 0, there may be nothing yet: the new output then, which no coefficient looks at."""
        place = next(i for i, (known, _, _) in enumerate(self.states) if known == name)
        first = place - SLOTS.index(self.data["state"][place]["slot"])
        new = given.get(f"{self.states[first][0]}_out")
        if new is None:
            return self.ir.node("Identity", [self.inputs[f"{name}_in"]])
        before = self.inputs[f"{self.states[place - 1][0]}_in"]
        if number:
            return self.ir.node("Identity", [before])
        parts = {}
        for side, value in (("then_branch", new), ("else_branch", before)):
            node = self.ir.node("Identity", [value])
            node.outputs[0].name, node.outputs[0].type = f"{name}/{side}", before.type
            parts[side] = self.ir.Graph([], node.outputs, nodes=[node], name=f"{name}_{side}")
        return self.ir.node("If", [self.at_start], parts)

    def _zero(self) -> Any:
        return self.ir.node("Constant", [], {"value": self.ir.tensor(np.array(0, np.int64))})

    def finish(self, graph: Any) -> Any:
        """The outermost choice becomes the main graph's end."""
        ir = self.ir
        outputs, nodes = list(graph.outputs), list(graph)
        graph.outputs.clear()
        graph.remove(nodes)
        self.name(outputs, "")
        step = self.call("Add", self.inputs[f"{STEP}_in"], self.constant("one", np.array([1], np.int64)))
        step.name, step.shape = f"{STEP}_out", ir.Shape([1])
        own = len(self.data["outputs"])
        main = ir.Graph(
            list(self.inputs.values()), [*outputs[:own], step, *outputs[own:]], nodes=[*self.nodes, *nodes],
            initializers=list(self.weights.values()), opset_imports=self.opsets, name="moeca",
        )  # fmt: skip
        return ir.Model(main, ir_version=self.version, metadata_props={"moeca.row": FUSED_ROW})


def _rename(ir: Any, graph: Any, prefix: str) -> None:
    """Names are the main graph's too: those of each variant get its own prefix."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.name = f"{prefix}{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for value in attribute.value.inputs:
                    value.name = f"{prefix}{value.name}"
