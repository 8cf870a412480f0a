"""torch's translator and onnxscript's optimizer give the same graph when they leave out what they did before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnxscript.optimizer import optimize
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import RewriteRule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.fx import passes

from moeca_compile.lowering.onnx import optimizer
from moeca_compile.lowering.onnx.optimizer import optimizing_once

BLOCKS = 3
BLOCK = """
    shape_{i} = Constant <value_ints: ints = [-1, 2, 6]> ()
    y_{i} = Reshape (x_{i}, shape_{i})
    again_{i} = Constant <value_ints: ints = [-1, {width}]> ()
    z_{i} = Reshape (y_{i}, again_{i})
    t_{i} = Transpose <perm: ints = [1, 0]> (z_{i})
    u_{i} = Transpose <perm: ints = [1, 0]> (t_{i})
    whole_{i} = Cast <to: int = 1> (u_{i})
    zero_{i} = Constant <value_float: float = {number}> ()
    v_{i} = Add (whole_{i}, zero_{i})
    x_{after} = Relu (v_{i})
"""


def model(widths: str = "12 12 12", numbers: str = "0.0 0.0 0.0") -> ir.Model:
    """Blocks with what rewrite rules look for: reshapes and transposes in a row, a cast and a sum that do nothing."""
    given = zip(widths.split(), numbers.split(), strict=True)
    blocks = [BLOCK.format(i=i, after=i + 1, width=width, number=number) for i, (width, number) in enumerate(given)]
    outputs = f"float[batch, {widths.split()[-1]}] x_{BLOCKS}"
    text = f'<ir_version: 10, opset_import: ["" : 20]> main (float[batch, 12] x_0) => ({outputs}) {{{"".join(blocks)}}}'
    return ir.from_proto(onnx.parser.parse_model(text))


def optimized(made: ir.Model) -> bytes:
    optimize(made)
    return ir.to_proto(made).SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "arguments", [(), ("12 6 12",), ("12 12 12", "0.0 1.0 0.0"), ("12 12 12", "1.0 0.5 1.0")], ids=str
)
def test_the_graph_is_the_same(arguments: tuple[str, ...]) -> None:
    plain = optimized(model(*arguments))
    with optimizing_once():
        assert optimized(model(*arguments)) == plain
    assert len(onnx.ModelProto.FromString(plain).graph.node) < len(model(*arguments).graph)


def test_equal_operators_are_asked_once_and_rules_are_tried_where_they_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"_do_inference": 0, "try_rewrite": 0}

    def counted(cls: Any, name: str) -> None:
        original: Callable[..., Any] = vars(cls)[name]

        def count(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(cls, name, count)

    counted(FoldConstantsPass, "_do_inference")
    counted(RewriteRule, "try_rewrite")
    optimized(model())
    plain = dict(calls)
    calls.update(dict.fromkeys(calls, 0))
    before = {
        name: vars(cls)[name] for cls, name in ((FoldConstantsPass, "_do_inference"), (RewriteRule, "try_rewrite"))
    }
    with optimizing_once():
        optimized(model())
    assert calls["_do_inference"] <= plain["_do_inference"] / 2
    assert calls["try_rewrite"] <= plain["try_rewrite"] / 5
    assert vars(FoldConstantsPass)["_do_inference"] is before["_do_inference"]
    assert vars(RewriteRule)["try_rewrite"] is before["try_rewrite"]


def test_types_are_promoted_without_tracing_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> torch.fx.GraphModule:
        def run(x: torch.Tensor) -> torch.Tensor:
            y = x.sin().cos() * 2  # the number becomes a tensor
            return (y.half() + x).exp() + torch.arange(3)

        return make_fx(run, tracing_mode="symbolic")(torch.randn(4, 3))

    traced: list[str] = []
    original = torch.fx.Interpreter.run_node

    def counted(interpreter: Any, node: torch.fx.Node) -> Any:
        traced.append(node.name)
        return original(interpreter, node)

    plain, mine = program(), program()
    passes.InsertTypePromotion(plain).run()
    monkeypatch.setattr(torch.fx.Interpreter, "run_node", counted)
    with optimizing_once():
        passes.InsertTypePromotion(mine).run()
    assert str(mine.graph) == str(plain.graph)
    assert "convert_element_type" in str(mine.graph)
    for one, other in zip(mine.graph.nodes, plain.graph.nodes, strict=True):
        assert kind(one) == kind(other)
    assert not {"sin", "cos", "exp"} & set(traced)


def kind(node: torch.fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else (str(value),)


def test_another_version_of_the_optimizer_does_all_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_FOLDING", "onnxscript.optimizer.somewhere_else")
    monkeypatch.delattr(RewriteRule, "try_rewrite")
    original = vars(FoldConstantsPass)["_do_inference"]
    with optimizing_once():
        assert vars(FoldConstantsPass)["_do_inference"] is original
        assert "try_rewrite" not in vars(RewriteRule)
