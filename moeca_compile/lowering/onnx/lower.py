"""Variant -> an ONNX graph, with the weights as its constants and the state as inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from moeca_compile.errors import LoweringError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.experts.choose import Lowering
from moeca_compile.lowering.experts.segments import segments
from moeca_compile.lowering.onnx.batch import Batches, dims
from moeca_compile.lowering.onnx.parameters import COMPUTED, as_initializers, as_inputs, computed_with, example_inputs
from moeca_compile.lowering.onnx.quantized.forms import write_nbits
from moeca_compile.lowering.onnx.quantized.keep import WIDENED
from moeca_compile.lowering.onnx.request import OnnxRequest
from moeca_compile.lowering.onnx.stable_sort import stable_sort
from moeca_compile.lowering.onnx.translate import tracing_quietly, translate
from moeca_compile.passes.manager import Pass, PassManager
from moeca_compile.runtime.bundle.dims import Dim, parts
from moeca_compile.runtime.bundle.manifest import DROPPED

# from 23 on there are Attention, RMSNormalization and RotaryEmbedding, which fewer runtimes have
OPSETS = range(18, 25)
SEGMENTS = Lowering("segments")


@dataclass(frozen=True)
class Signature:
    """What goes in and out of a variant: placeholder names to ONNX names, and all shapes with the batch in them."""

    inputs: tuple[tuple[str, tuple[Dim, ...]], ...]
    outputs: tuple[tuple[str, tuple[Dim, ...]], ...]


def lower_onnx(
    variants: Sequence[Variant], batches: Batches, weights: Mapping[str, torch.Tensor], names: Mapping[str, str],
    outputs: Sequence[str], opset: int, experts: Lowering = SEGMENTS, passes: Sequence[Pass[OnnxRequest]] = (),
    manager: PassManager | None = None, parameters: Mapping[str, str] | None = None,
    hoisted: Mapping[str, Node] | None = None,
) -> tuple[Any, Signature]:  # fmt: skip
    """Translate one variant.

    Args:
        variants: the same one, captured at each of `batches`; a single one gives a graph for its one batch only.
        weights: by placeholder name: these become constants.
        names: ONNX names of the other placeholders.
        outputs: ONNX names of all outputs.
        opset: of the standard ONNX domain.
        experts: the form of the routed experts. With a capacity, the graph has one more output, `DROPPED`.
        passes: graph passes on the way to ONNX.
        manager: runs them.
        parameters: by placeholder name, what the model calls its weights. Those in it can be exchanged in the bundle.
        hoisted: by placeholder name, the nodes of prologues that compute what comes in there.

    Returns:
        An onnx_ir.Model, and its signature. The model's meta and those of its initializers say what they are made of
        (`parameters.py`).

    Raises:
        LoweringError: an operator has no ONNX form, or the graph isn't linear in the batch.
    """
    variant, *twins = variants
    signature = _signature(variants, weights, names, outputs, batches)
    graphs = tuple(one.gm for one in variants)
    request = OnnxRequest(graphs, batches, weights, experts, parameters or {}, opset, hoisted or {})
    gm = (manager or PassManager()).rewrite(passes, variant.gm, request, label=f"{variant.name} ")
    if len(list(fx.nodes_of(fx.output_node(gm).args[0]))) > len(signature.outputs):
        signature = replace(signature, outputs=(*signature.outputs, (DROPPED, ())))
    constants = as_inputs(gm)
    example = example_inputs(gm, constants)
    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple(
        {i: _symbol(dim, batch) for i, dim in enumerate(shape) if isinstance(dim, str)} for _, shape in signature.inputs
    )
    dynamic += ({},) * len(constants)
    fx.code_of(gm)  # torch.export reads the signature of the generated code
    table = {torch.ops.moeca.experts.default: segments(opset), aten.sort.stable: stable_sort(opset)}
    with tracing_quietly():
        try:
            exported = torch.export.export(gm, example, dynamic_shapes=dynamic if twins else None, strict=False)
            model = translate(exported, opset, table)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(
                f"variant {variant.name} has no ONNX form at opset {opset}: {_reason(error)}"
            ) from error
    write_nbits(model)
    as_initializers(model, constants)
    model.meta[COMPUTED] = computed_with(gm)
    model.meta[WIDENED] = gm.meta.get(WIDENED, frozenset())
    _finish(model, signature)
    return model, signature


def _signature(
    variants: Sequence[Variant], weights: Mapping[str, Any], names: Mapping[str, str], outputs: Sequence[str],
    batches: Batches,
) -> Signature:  # fmt: skip
    takes = [[node for node in fx.placeholders(one.gm) if node.name not in weights] for one in variants]
    gives = [list(fx.nodes_of(fx.output_node(one.gm).args[0])) for one in variants]
    said = [
        [dims([fx.shape(one) for one in row], batches) for row in zip(*side, strict=True)] for side in (takes, gives)
    ]
    return Signature(
        tuple((names[node.name], shape) for node, shape in zip(takes[0], said[0], strict=True)),
        tuple(zip(outputs, said[1], strict=True)),
    )


def _symbol(dim: str, batch: Any) -> Any:
    """A dimension for torch.export: it knows a * batch + b as we do."""
    factor, offset = parts(dim)
    found = batch if factor == 1 else factor * batch
    return found + offset if offset else found


def _finish(model: Any, signature: Signature) -> None:
    """Plain inputs and outputs with our names and sizes, and nothing of the machine that made them."""
    import onnx_ir as ir
    from onnx_ir.passes import Sequential
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, OutputFixPass

    graph = model.graph
    for i, value in enumerate(graph.outputs):
        if value.is_initializer():  # OutputFixPass looks at inputs and at values that are given twice
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
    Sequential(OutputFixPass(), ClearMetadataAndDocStringPass())(model)
    for values, named in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        for value, (name, shape) in zip(values, named, strict=True):
            value.name = name
            value.shape = ir.Shape(shape)
    results = [value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs]
    for one in (model, graph, *graph.inputs, *graph.initializers.values(), *results):
        one.metadata_props.clear()
    graph.name, graph.doc_string, model.doc_string = "moeca", None, None


def _reason(error: BaseException) -> str:
    """The innermost cause's first lines: the translator wraps it in pages of reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:600]}"
