"""The translator's short ways, against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.fx import Graph
from torch.onnx._internal.exporter._registration import ONNXRegistry

from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx import translate as translating
from moeca_compile.lowering.onnx.translate import is_decomposed, tracing_quietly, translate

TRANSPOSED = torch.randn(2, 3, 4)


class Called(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(function: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with tracing_quietly():
        return torch.export.export(Called(function), (TRANSPOSED,), dynamic_shapes=({0: batch},), strict=False)


def plain(x: Tensor) -> Tensor:
    y = x.transpose(1, 2).reshape(x.shape[0], 12)
    return torch.nn.functional.silu(y) + y.mean(-1, keepdim=True)


def in_place(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x * 2, inplace=True)


def of_several_types(x: Tensor) -> Tensor:
    return (x.half() * 2 + x).double() * (x > 0) / x.shape[0] + torch.arange(4) / 2


def without_translation(x: Tensor) -> Tensor:
    return torch.nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none")


def text(model: ir.Model) -> list[tuple[Any, ...]]:
    """A graph's operators without the names of what is between them."""
    numbers: dict[str | None, int] = {}

    def number(value: ir.Value | None) -> Any:
        if value is None or value.const_value is None:
            return None if value is None else numbers.setdefault(value.name, len(numbers))
        return value.const_value.numpy().tolist()

    return [
        (node.op_type, [number(one) for one in node.inputs], [number(one) for one in node.outputs],
         sorted((name, str(value.value)) for name, value in node.attributes.items()))
        for node in model.graph
    ]  # fmt: skip


@pytest.mark.slow  # torch reads its translations anew
@pytest.mark.parametrize(
    ("function", "is_short"),
    [(plain, True), (of_several_types, False), (in_place, False), (without_translation, False)],
)
def test_the_graph_is_the_one_that_torch_makes(function: Callable[[Tensor], Tensor], is_short: bool) -> None:
    program = exported(function)
    traces = []
    decompose = program.run_decompositions

    def counted(table: Any) -> Any:
        traces.append(table)
        return decompose(table)

    vars(program)["run_decompositions"] = counted
    with tracing_quietly():
        mine = text(translate(program, 20, {}))
        theirs = torch.onnx.export(exported(function), dynamo=True, opset_version=20, optimize=True, verbose=False)
    assert theirs is not None
    assert mine == text(theirs.model)
    assert (traces == []) is is_short


def test_what_must_be_decomposed_is_told_apart() -> None:
    def every(operator: Any) -> bool:
        return True

    graph = exported(plain).graph
    assert is_decomposed(graph, {}, every)
    assert not is_decomposed(graph, {aten.silu.default: None}, every)
    assert not is_decomposed(graph, {}, lambda operator: operator is not aten.silu.default)
    assert not is_decomposed(exported(in_place).graph, {}, every)
    calling = Graph()
    calling.get_attr("inner")
    assert not is_decomposed(calling, {}, every)


def test_an_operator_of_no_table_and_no_translation_is_decomposed() -> None:
    """`aten.to.dtype`: torch takes it apart in every decomposition, and has no translation of it."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.to.dtype, (x, torch.float64)),))
    program = torch.export.export(torch.fx.GraphModule(torch.nn.Module(), graph), (torch.randn(3),), strict=False)
    assert aten.to.dtype in {node.target for node in program.graph.nodes}
    with tracing_quietly():
        assert [node.op_type for node in translate(program, 20, {}).graph] == ["Cast"]


def test_the_registry_is_read_once_and_what_an_export_adds_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(cls: Any, opset_version: int) -> Any:
        reads.append(opset_version)
        registry = cls()
        registry.register_op(aten.view.default, plain)
        registry.register_op(aten.silu.default, plain)
        return registry

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    with translating._registry_read_once(20) as is_translated:
        first = ONNXRegistry.from_torchlib(opset_version=20)
        first.register_op(aten.silu.default, plain)
        second = ONNXRegistry.from_torchlib(opset_version=20)
        assert is_translated(aten.silu.default)
        assert not is_translated(aten.to.dtype)
    assert reads == [20]
    assert [len(one.functions["aten::silu"]) for one in (first, second)] == [2, 1]
    assert second.functions["aten::reshape"][0].onnx_function is plain
    assert ONNXRegistry.from_torchlib(opset_version=20) is not None
    assert reads == [20, 20]  # torch's own again
