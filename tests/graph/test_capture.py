"""Capture: one functional graph with whole operators, honest names, and nothing dropped on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._ops import OpOverload

from moeca_compile.errors import CaptureError
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, capture
from tests.tools import capture_module, node, ops, run_graph, same, trace_calls, trace_module


class Block(nn.Module):
    """Attention and a feed-forward, with the in-place habits of real code."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.register_buffer("scale", torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        h.mul_(self.scale)
        h[:, 0] = 0.0
        x = x + self.proj(h)
        x += self.mlp(x)
        return x.view(-1, x.shape[-1]).add_(1.0).view_as(x)


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def captured(block: Block) -> tuple[Capture, tuple[Any, ...]]:
    return capture_module(block, torch.randn(2, 3, 8))


def test_the_graph_is_functional(captured: tuple[Capture, tuple[Any, ...]]) -> None:
    targets = [n.target for n in captured[0].gm.graph.nodes if n.op == "call_function"]
    schemas = [target._schema for target in targets if isinstance(target, OpOverload)]
    assert len(schemas) > 10
    assert not [schema for schema in schemas if schema.is_mutable]


def test_attention_and_linear_and_norm_stay_whole(captured: tuple[Capture, tuple[Any, ...]]) -> None:
    count = ops(captured[0].gm)
    assert count["aten.scaled_dot_product_attention.default"] == 1
    assert count["aten.linear.default"] == 4
    assert count["aten.layer_norm.default"] == 1
    assert not any(name.startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten._softmax", "aten.t.")) for name in count)


def test_convolution_stays_whole() -> None:
    count = ops(capture_module(nn.Conv2d(3, 4, 2, 2), torch.randn(1, 3, 4, 4))[0].gm)
    assert count == {"aten.conv2d.default": 1}


def test_the_graph_gives_bitwise_what_eager_gives(block: Block, captured: tuple[Capture, tuple[Any, ...]]) -> None:
    graph, args = captured
    x = next(arg for arg, one in zip(args, graph.inputs, strict=True) if not one.is_weight)
    before = x.clone()
    (result,) = run_graph(graph.gm, args)
    with torch.no_grad():
        assert same(result, block(x))
    assert same(x, before)


def test_placeholders_are_named_after_parameters_buffers_and_arguments(
    block: Block, captured: tuple[Capture, tuple[Any, ...]]
) -> None:
    graph, args = captured
    by_label = dict(zip((one.label for one in graph.inputs), args, strict=True))
    owned = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    assert set(by_label) == {*owned, "x"}
    assert all(by_label[name] is tensor for name, tensor in owned.items())
    assert [one.name for one in graph.inputs] == [n.name for n in fx.placeholders(graph.gm)]
    assert {one.name for one in graph.inputs} == {name.replace(".", "_") for name in by_label}
    assert {one.label for one in graph.inputs if not one.is_weight} == {"x"}


def test_a_capture_prints_as_code(captured: tuple[Capture, tuple[Any, ...]]) -> None:
    assert "scaled_dot_product_attention" in str(captured[0])
    assert "mlp_0_weight" in str(captured[0])


def test_module_paths_and_source_lines_are_kept(captured: tuple[Capture, tuple[Any, ...]]) -> None:
    linears = [n for n in captured[0].gm.graph.nodes if n.target is fx.aten.linear.default]
    assert [fx.module_path(n) for n in linears] == ["qkv", "proj", "mlp.0", "mlp.2"]
    assert all(fx.where(n).startswith("test_capture.py:") for n in linears)


def test_labels_that_read_alike_get_names_of_their_own() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Module()
            self.a.b = nn.Parameter(torch.ones(3))
            self.a_b = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, add: Tensor, mul: Tensor) -> Tensor:
            return add * self.a.b + mul * self.a_b

    graph, args = capture_module(Alike(), torch.ones(3), torch.ones(3) * 5)
    names = [n.name for n in graph.gm.graph.nodes]
    assert len(set(names)) == len(names)
    assert {one.label for one in graph.inputs} == {"a.b", "a_b", "add", "mul"}
    assert run_graph(graph.gm, args)[0].tolist() == [11.0] * 3


@pytest.mark.parametrize("taken", ["coefficients", "state_000", "state_1234"])
def test_an_argument_called_like_a_variant_s_own_inputs_gets_another_name(taken: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def model(x, {taken}): return x * {taken}", scope)
    graph, args = capture_module(scope["model"], torch.ones(3), torch.full((3,), 2.0))
    assert {one.label for one in graph.inputs} == {"x", taken}
    assert taken not in {n.name for n in graph.gm.graph.nodes}
    assert run_graph(graph.gm, args)[0].tolist() == [2.0] * 3


def test_a_tied_weight_is_one_placeholder() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    graph, args = capture_module(tied, torch.randn(2, 4))
    assert sum(arg is tied[0].weight for arg in args) == 1
    assert ops(graph.gm)["aten.linear.default"] == 2


def test_sizes_are_numbers_even_where_dynamo_made_them_symbols() -> None:
    def model(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).softmax(-1) * x.shape[1]

    calls = [(torch.randn(2, 6, 3),), (torch.randn(4, 5, 7),)]
    traces = trace_calls(model, *calls, dynamic=True)
    assert traces[0].gm is traces[1].gm
    assert len(traces[0].args) > 1, "Dynamo handed over no symbolic size: this test shows nothing"
    for traced, (x,) in zip(traces, calls, strict=True):
        graph = capture(traced.gm, traced.args, traced.inputs)
        (result,) = run_graph(graph.gm, traced.args)
        (output,) = fx.nodes_of(fx.output_node(graph.gm).args)
        assert fx.shape(output) == tuple(result.shape)
        assert all(isinstance(size, int) for size in fx.need(output).shape)
        assert same(result, model(x))


def test_none_and_numbers_and_several_outputs_go_through() -> None:
    def model(x: Tensor, mask: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        return x * factor, x - 1 if mask is None else x + mask

    graph, args = capture_module(model, torch.ones(2, 2), None, 3.0)
    left, right = run_graph(graph.gm, args)
    assert left.tolist() == [[3.0, 3.0]] * 2
    assert right.tolist() == [[0.0, 0.0]] * 2


# -- refusals ---------------------------------------------------------------------------------------------------------


class Mutates(nn.Module):
    def __init__(self, how: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("calls", torch.zeros(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        self.how(self.inner, x)
        return x * self.inner.calls


@pytest.mark.parametrize(
    "how",
    [
        lambda own, x: own.calls.add_(1),
        lambda own, x: own.calls.copy_(x[0]),
        lambda own, x: own.calls[1:2].fill_(3.0),
        lambda own, x: own.calls.view(2, 2)[0].mul_(2.0),
        lambda own, x: own.calls.detach().zero_(),
    ],
    ids=["add_", "copy_", "slice", "view", "detach"],
)
def test_a_changed_buffer_is_refused_by_name_with_the_remedy(how: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(CaptureError, match=r"changes inner\.calls in place.*input or an output of the model"):
        capture_module(Mutates(how), torch.randn(2, 4))


def test_a_changed_argument_is_refused_by_name() -> None:
    def model(x: Tensor, noise: Tensor) -> Tensor:
        noise.mul_(2.0)
        return x + noise

    with pytest.raises(CaptureError, match="changes noise in place"):
        capture_module(model, torch.randn(2), torch.randn(2))


def test_all_changed_tensors_are_named_once() -> None:
    def how(own: nn.Module, x: Tensor) -> None:
        own.calls.add_(1)
        own.calls.add_(1)
        x.zero_()

    with pytest.raises(CaptureError, match=r"changes inner\.calls, x in place"):
        capture_module(Mutates(how), torch.randn(2, 4))


def test_batch_norm_in_training_is_refused() -> None:
    with pytest.raises(CaptureError, match="running_mean"):
        capture_module(nn.BatchNorm1d(4).train(), torch.randn(2, 4))


def test_a_change_to_a_value_of_the_model_s_own_is_fine() -> None:
    def model(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = 7.0
        return y

    graph, args = capture_module(model, torch.zeros(2, 2))
    assert run_graph(graph.gm, args)[0].tolist() == [[7.0, 7.0], [0.0, 0.0]]


def test_a_number_read_out_of_a_tensor_is_read_anew_each_time() -> None:
    with dynamo_config.patch(capture_scalar_outputs=True):
        graph, (x, _) = capture_module(lambda x, t: x * t.item(), torch.randn(2), torch.tensor(3.0))
    assert same(run_graph(graph.gm, (x, torch.tensor(5.0)))[0], x * 5)


def test_a_size_that_depends_on_data_is_that_of_the_call() -> None:
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        graph, _ = capture_module(lambda x: x[x > 0].sum(), torch.tensor([1.0, -1.0, 2.0]))
    assert run_graph(graph.gm, (torch.tensor([-1.0, -1.0, 4.0]),))[0] == 4
    assert not any(fx.has_unknown_size(node) and not fx.shape(node) for node in graph.gm.graph.nodes)


# -- what is left as it was -------------------------------------------------------------------------------------------


def ambient() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        torch._guards.TracingContext.try_get(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


def test_capture_leaves_the_world_as_it_was(block: Block) -> None:
    traced = trace_module(block, torch.randn(2, 3, 8))
    code, metas = traced.gm.code, [dict(n.meta) for n in traced.gm.graph.nodes]
    tensors = [(arg.clone(), arg.requires_grad, arg._version) for arg in traced.args]
    for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            before = ambient()
            capture(traced.gm, traced.args, traced.inputs)
            assert ambient() == before
    assert traced.gm.code == code
    assert [dict(n.meta) for n in traced.gm.graph.nodes] == metas
    for (old, wants_grad, version), arg in zip(tensors, traced.args, strict=True):
        assert same(old, arg)
        assert (wants_grad, version) == (arg.requires_grad, arg._version)


def test_a_refusal_leaves_the_world_as_it_was() -> None:
    traced = trace_module(Mutates(lambda own, x: own.calls.add_(1)), torch.randn(2, 4))
    before, calls = ambient(), traced.args[0].clone()
    with pytest.raises(CaptureError):
        capture(traced.gm, traced.args, traced.inputs)
    assert ambient() == before
    assert same(traced.args[0], calls)


def test_a_random_draw_in_the_model_is_not_taken_at_capture() -> None:
    torch.manual_seed(3)
    traced = trace_module(lambda x: x + torch.randn_like(x), torch.zeros(4))
    state = torch.get_rng_state()
    graph = capture(traced.gm, traced.args, traced.inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert any("randn_like" in name for name in ops(graph.gm))


def test_capture_in_inference_mode_is_the_same_graph(block: Block) -> None:
    x = torch.randn(2, 3, 8)
    traced = trace_module(block, x)
    with torch.inference_mode():
        inside = capture(traced.gm, [arg.clone() for arg in traced.args], traced.inputs)
        (result,) = torch.fx.Interpreter(inside.gm).run(*traced.args)
        assert torch.is_inference_mode_enabled()
    assert str(inside) == str(capture(traced.gm, traced.args, traced.inputs))
    with torch.no_grad():
        assert same(result.clone(), block(x))


def test_the_same_module_is_captured_twice_alike(block: Block) -> None:
    first, second = (capture_module(block, torch.randn(2, 3, 8))[0] for _ in range(2))
    assert first.inputs == second.inputs
    assert str(first) == str(second)
    assert [n.name for n in first.gm.graph.nodes] == [n.name for n in second.gm.graph.nodes]


def test_capture_keeps_no_fake_tensor_in_the_arguments(block: Block) -> None:
    graph, args = capture_module(block, torch.randn(2, 3, 8))
    assert type(args[0]) in (Tensor, nn.Parameter)
    assert fx.need(node(graph.gm, "x")).shape == (2, 3, 8)
