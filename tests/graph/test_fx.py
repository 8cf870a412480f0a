"""The FX helpers: reachability, values, names, marks, and every InvariantError."""

from __future__ import annotations

import operator
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from moeca_compile.errors import InvariantError
from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.schedule import Action
from tests.tools import capture_module, node


def chain(links: list[list[int]]) -> GraphModule:
    """Nodes n0, n1, ... where links[i] are the earlier nodes that n(i+1) reads."""
    graph = Graph()
    nodes = [graph.placeholder("n0")]
    for sources in links:
        nodes.append(graph.call_function(torch.cat, ([nodes[i] for i in sources],), name=f"n{len(nodes)}"))
    graph.output((nodes[-1],))
    return GraphModule({}, graph)


@st.composite
def dags(draw: st.DrawFn) -> list[list[int]]:
    count = draw(st.integers(1, 9))
    return [draw(st.lists(st.integers(0, i), max_size=3, unique=True)) for i in range(count)]


def paths(links: list[list[int]], above: int, below: int) -> set[int]:
    """All nodes on a path, by walking every path: slow and plain."""
    found: set[int] = set()
    for source in links[below - 1] if below else []:
        inner = paths(links, above, source)
        if source == above or inner:
            found |= inner | {source, below}
    return found


@settings(max_examples=60, deadline=None)
@given(dags())
def test_the_cone_knows_every_path(links: list[list[int]]) -> None:
    gm = chain(links)
    cone = fx.Cone(gm)
    for above, below in combinations(range(len(links) + 1), 2):
        on_the_way = paths(links, above, below)
        a, b = cone.nodes[above], cone.nodes[below]
        assert cone.feeds(a, b) == bool(on_the_way)
        assert not cone.feeds(b, a)
        if on_the_way:
            assert [n.name for n in cone.between(a, b)] == [f"n{i}" for i in sorted(on_the_way - {above})]


def test_a_node_does_not_feed_itself() -> None:
    cone = fx.Cone(chain([[0], [1]]))
    assert not any(cone.feeds(n, n) for n in cone.nodes)


def test_between_holds_side_paths_but_not_what_comes_from_elsewhere() -> None:
    cone = fx.Cone(chain([[0], [0], [], [1, 2, 3]]))  # n4 reads n1 and n2, both of n0, and n3, which reads nothing
    assert [n.name for n in cone.between(cone.nodes[0], cone.nodes[4])] == ["n1", "n2", "n4"]


def graph_of(*values: object) -> tuple[GraphModule, list[Node]]:
    graph = Graph()
    nodes = [graph.placeholder(f"p{i}") for i in range(len(values))]
    for one, val in zip(nodes, values, strict=True):
        one.meta["val"] = val
    graph.output(tuple(nodes))
    return GraphModule({}, graph), nodes


def test_values_and_shapes_of_tensors_and_of_others() -> None:
    _, (tensor, number, nothing) = graph_of(torch.zeros(2, 3), 7, None)
    assert fx.shape(tensor) == (2, 3)
    assert fx.need(tensor) is fx.tensor(tensor) is fx.value(tensor)
    assert fx.value(number) == 7
    assert fx.tensor(number) is fx.tensor(nothing) is None
    assert fx.shape(number) == ()


def test_a_node_that_must_be_a_tensor_and_is_not_is_named() -> None:
    _, (number,) = graph_of(7)
    with pytest.raises(InvariantError, match="p0 has no tensor value"):
        fx.need(number)


def test_an_argument_that_must_be_a_node_and_is_not_is_named() -> None:
    gm, (one,) = graph_of(torch.zeros(2))
    with gm.graph.inserting_before(fx.output_node(gm)):
        added = gm.graph.call_function(aten.mul.Tensor, (one, 3))
    assert fx.arg(added, 0) is one
    with pytest.raises(InvariantError, match=f"{added.name}: argument 1 is 3, expected a node"):
        fx.arg(added, 1)


def test_nodes_of_looks_into_lists_and_tuples() -> None:
    _, (a, b, c) = graph_of(1, 2, 3)
    assert list(fx.nodes_of(((a, [b, 4]), "x", [(c,)], a))) == [a, b, c, a]
    assert list(fx.nodes_of(5)) == []


def test_resolve_finds_nodes_in_the_order_asked() -> None:
    gm, (a, b) = graph_of(1, 2)
    assert fx.resolve(gm, ["p1", "p0", "p1"]) == [b, a, b]


def test_resolve_names_what_is_missing() -> None:
    gm, _ = graph_of(1, 2)
    with pytest.raises(InvariantError, match=r"no node named \['q', 'r'\]"):
        fx.resolve(gm, ["p0", "q", "r"])


def test_strip_climbs_first_arguments_only_while_it_may() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    sine = graph.call_function(aten.sin.default, (x,))
    flat = graph.call_function(aten.view.default, (sine, [6]))
    turned = graph.call_function(aten.unsqueeze.default, (flat, 0))
    assert fx.strip(turned, fx.is_view) is sine
    assert fx.strip(sine, fx.is_view) is sine
    assert not fx.is_view(x)


def test_placeholders_and_output() -> None:
    gm, nodes = graph_of(1, 2)
    assert fx.placeholders(gm) == nodes
    assert fx.output_node(gm).op == "output"


def test_only_a_mutation_has_an_effect_a_random_draw_has_none() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    kept = [x, graph.call_function(aten.add_.Tensor, (x, x))]
    gone = [graph.call_function(aten.add.Tensor, (x, x)), graph.call_function(fx.SDPA, (x, x, x, None, 0.5))]
    gone.append(graph.call_function(operator.getitem, (x, 0)))
    assert [fx.has_effect(n) for n in (*kept, *gone)] == [True, True, False, False, False]
    assert fx.has_effect(graph.output((x,)))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self']._modules['norm']._buffers['scale']", "norm.scale"),
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self']._orig_mod.blocks.0", "blocks.0"),
        ("L['x']", "x"),
        ("L['model']._modules['head']._parameters['bias']", "head.bias"),
        ("L['function_reference'].forward.__self__.__dict__['_modules']['head']._parameters['bias']", "head.bias"),
        ("", ""),
    ],
)
def test_dynamo_sources_become_dotted_names(source: str, name: str) -> None:
    assert fx.dotted(source) == name


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x).sin()


def test_a_node_knows_its_module_and_its_line() -> None:
    captured, _ = capture_module(Nested(), torch.randn(2, 4))
    linear = node(captured.gm, "linear")
    assert fx.module_path(linear) == "blocks.0.0"
    assert fx.where(node(captured.gm, "sin")).startswith("test_fx.py:")
    assert fx.where(node(captured.gm, "x")) == ""
    assert fx.module_path(node(captured.gm, "x")) == ""


def test_marks_come_back_in_graph_order() -> None:
    gm, (a, b) = graph_of(1, 2)
    second, first = fx.Mark(1, 0, Action.REUSE), fx.Mark(0, 0, Action.COMPUTE)
    fx.set_mark(b, second)
    fx.set_mark(a, first)
    assert fx.marked(gm) == [(a, first), (b, second)]


def test_a_mark_that_appears_twice_is_refused() -> None:
    gm, (a, b) = graph_of(1, 2)
    fx.set_mark(a, fx.Mark(3, 1, Action.COMPUTE))
    fx.set_mark(b, fx.Mark(3, 1, Action.REUSE))
    with pytest.raises(InvariantError, match=r"marks appear twice: \[\(3, 1\), \(3, 1\)\]"):
        fx.marked(gm)


def test_a_call_gets_its_fake_value_and_its_origin() -> None:
    with FakeTensorMode() as mode:
        gm, (x,) = graph_of(torch.zeros(2, 3, dtype=torch.bfloat16))
    x.meta["stack_trace"] = 'File "model.py", line 12'
    with gm.graph.inserting_before(fx.output_node(gm)):
        wide = fx.call(gm, aten._to_copy.default, (x,), {"dtype": torch.float32}, like=x)
    assert (fx.shape(wide), fx.need(wide).dtype) == ((2, 3), torch.float32)
    assert fx.need(wide).fake_mode is mode  # type: ignore[attr-defined]
    assert fx.where(wide) == "model.py:12"


def test_a_call_without_fake_inputs_runs_for_real() -> None:
    gm, (x,) = graph_of(torch.ones(2))
    with gm.graph.inserting_before(fx.output_node(gm)):
        twice = fx.call(gm, aten.add.Tensor, (x, x))
    assert fx.need(twice).tolist() == [2.0, 2.0]


def test_experts_are_known_by_their_operator() -> None:
    import moeca_compile.ops.experts  # noqa: F401 - defines the operator

    graph = Graph()
    x = graph.placeholder("x")
    ours = graph.call_function(torch.ops.moeca.experts.default, (x, x, [x], [x], [], [], [], [], "silu"))
    assert fx.is_experts(ours)
    assert not fx.is_experts(graph.call_function(aten.mm.default, (x, x)))
    assert not fx.is_experts(graph.call_function(operator.add, (x, x)))
