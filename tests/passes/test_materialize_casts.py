"""Autocast becomes nodes: the graph, run without autocast, is bitwise what eager computes with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Interpreter, Node

import moeca_compile as moeca
import moeca_compile.ops.experts
from moeca_compile.errors import CaptureError, OptionError
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.graph.capture import Capture, capture
from moeca_compile.options import Options
from moeca_compile.passes.facts import Facts
from moeca_compile.passes.manager import PassManager
from moeca_compile.passes.transform.materialize_casts import materialize_casts
from tests.tools import analyze_module, capture_module, ops, same, trace_module, with_casts

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def cast(dtype: torch.dtype = BF16, enabled: bool = True) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


class Net(nn.Module):
    """Every kind of op that CPU autocast knows: to lower precision, to float32, promoted, and left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.requires_grad_(False)  # torch's own cache of cast weights mixes up dtypes

    def body(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        weights = (q @ k.transpose(1, 2) / 3).softmax(dim=-1)
        both = torch.cat([h, (weights @ v).float()], dim=-1)
        return both.sum(-1, keepdim=True) + self.out(F.gelu(self.qkv(h)[..., :8])).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Inside(Net):
    """Autocast regions inside the model, as `cast` of the call site tells."""

    def __init__(self, *regions: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.regions = regions

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for region in self.regions:
            with region():
                y = self.out(y + self.body(x)) * 0.1
        return y + self.out(y.float())


class Checking(Interpreter):
    """Runs a graph and checks that every value is what its fake value says."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            assert (result.dtype, tuple(result.shape)) == (fx.need(n).dtype, fx.shape(n)), n.format_node()
        return result


@contextmanager
def quiet() -> Iterator[None]:
    """Dynamo's trace of an autocast inside an autocast warns about the device; it is not what we test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compare(
    model: Callable[..., Any],
    *inputs: Tensor,
    names: Sequence[str] = ("",),
    ambient: AbstractContextManager[Any] | None = None,
) -> Capture:
    """Capture under `ambient`, run without it, and hold the results against eager under it."""
    context = ambient or nullcontext()
    with quiet(), torch.no_grad(), context:
        traced = trace_module(model, *inputs)
        expected = model(*inputs)
        captured = capture(traced.gm, traced.args, traced.inputs)
    assert ambient_autocast() == ()
    graph = with_casts(captured)
    with torch.no_grad():
        results = Checking(graph.gm).run(*traced.args)
    for name, left, right in zip(names, results, expected if len(names) > 1 else (expected,), strict=True):
        assert same(left, right), f"{name}: {left.dtype} {right.dtype} {(left - right).abs().max()}"
    assert not [name for name in ops(graph.gm) if "autocast" in name]
    return graph


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_without_autocast_nothing_is_cast(x: Tensor) -> None:
    graph = compare(Net(), x)
    assert "aten._to_copy.default" not in ops(graph.gm)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_ambient_autocast_is_in_the_graph(x: Tensor, dtype: torch.dtype) -> None:
    graph = compare(Net(), x, ambient=cast(dtype))
    linears = [n for n in graph.gm.graph.nodes if n.target is fx.aten.linear.default]
    assert {fx.need(n).dtype for n in linears} == {dtype}


REGIONS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], ...]] = {
    "one": (cast,),
    "off": (lambda: cast(enabled=False),),
    "two dtypes": (cast, lambda: cast(F16)),
    "on and off": (cast, lambda: cast(enabled=False), lambda: cast(F16)),
}


@pytest.mark.parametrize("outside", [None, pytest.param(BF16, marks=pytest.mark.slow)], ids=["plain", "bf16"])
@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
def test_regions_inside_the_model_are_in_the_graph(
    x: Tensor, regions: tuple[Callable[[], AbstractContextManager[Any]], ...], outside: torch.dtype | None
) -> None:
    compare(Inside(*regions), x, ambient=None if outside is None else cast(outside))


@pytest.mark.slow
def test_nested_regions_end_where_they_end(x: Tensor) -> None:
    class Nested(Net):
        def forward(self, x: Tensor) -> Tensor:
            with cast():
                a = self.body(x)
                with cast(enabled=False):
                    b = self.body(x)
                    with cast(F16):
                        c = self.body(x)
                    d = self.body(x)
                e = self.body(x)
            return torch.stack([v.float() for v in (a, b, c, d, e, self.body(x))])

    compare(Nested(), x)
    compare(Nested(), x, ambient=cast(F16))


def test_a_region_without_a_dtype_takes_the_default_one(x: Tensor) -> None:
    compare(Inside(lambda: torch.autocast("cpu")), x)


def test_a_float64_model_is_not_cast(x: Tensor) -> None:
    graph = compare(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).double(), x.double(), ambient=cast())
    assert {fx.need(n).dtype for n in graph.gm.graph.nodes if n.op == "call_function"} == {F64}


def test_a_bfloat16_model_under_autocast(x: Tensor) -> None:
    compare(Net().bfloat16(), x.bfloat16(), ambient=cast())


def test_a_cast_of_the_model_s_own_is_kept_as_it_is(x: Tensor) -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            wide = self.norm(x.to(BF16).flatten(1)[:, :8].float()).double()
            return self.out(wide.to(F16)).float().softmax(-1, dtype=F32)

    compare(Own(), x, ambient=cast())
    compare(Own(), x, ambient=cast(F16))


W = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))

# Each gets x [5, 8] float32; `x @ W` is what autocast makes lower precision. Composite ops, ops that convert by
# themselves, promoting ops, and casts of the model's own that change something only because of autocast.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "addmm": lambda x: torch.addmm(W[0], x, W),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], W[None]),
    "conv1d": lambda x: F.conv1d(x[None], W[:4, :5, None]),
    "einsum": lambda x: torch.einsum("td,df->tf", x, W),
    "einsum of two dtypes": lambda x: torch.einsum("td,td->t", x @ W, x),
    "inner": lambda x: torch.inner(x, x),
    "tensordot": lambda x: torch.tensordot(x, W, 1),
    "vector": lambda x: x @ W[0],
    "batched": lambda x: (x @ W).view(5, 2, 4).transpose(0, 1) @ torch.ones(2, 4, 3),
    "sdpa": lambda x: F.scaled_dot_product_attention((x @ W)[None, None], x[None, None], x[None, None]),
    "sdpa written out": lambda x: F.scaled_dot_product_attention((x @ W)[None], x[None], x[None]),
    "sdpa with a mask": lambda x: F.scaled_dot_product_attention((x @ W)[None], x[None], x[None], W[:5, :5]),
    "layer_norm": lambda x: F.layer_norm(x @ W, (8,)),
    "group_norm": lambda x: F.group_norm((x @ W)[None], 5),
    "rms_norm": lambda x: F.rms_norm(x @ W, (8,)) * F.rms_norm(x, (8,)),
    "softmax": lambda x: (x @ W).softmax(-1),
    "softmax to float32": lambda x: F.softmax(x @ W, -1, dtype=F32),
    "log_softmax": lambda x: F.log_softmax(x @ W, -1),
    "normalize": lambda x: F.normalize(x @ W),
    "cosine": lambda x: F.cosine_similarity(x @ W, x),
    "sum": lambda x: (x @ W).sum(-1),
    "cumsum": lambda x: (x @ W).cumsum(-1),
    "gelu": lambda x: F.gelu(x @ W) * F.silu(x @ W),
    "cat": lambda x: torch.cat([x, x @ W], -1),
    "stack": lambda x: torch.stack([x @ W, x]),
    "where": lambda x: torch.where(x > 0, x @ W, x),
    "addcmul": lambda x: torch.addcmul(x, x @ W, x @ W),
    "topk": lambda x: (x @ W).sigmoid().topk(2)[0],
    "own float": lambda x: (x @ W).float() * 1.37,
    "own float, in place": lambda x: (x @ W).float().mul_(1.37),
    "own half of float": lambda x: (x @ W).float().half() * 1.37,
    "a weight to the dtype of an activation": lambda x: (x @ W) + W[0].to((x @ W).dtype),
    "a matmul with such a weight": lambda x: (x @ W) @ W.to((x @ W).dtype),
    "a branch on the dtype": lambda x: x * 2 if (x @ W).dtype == BF16 else x * 3,
    "zeros_like": lambda x: torch.zeros_like(x @ W).index_add_(0, torch.arange(5), x @ W),
}


def test_every_op_under_autocast_is_bitwise_that_of_eager() -> None:
    compare(lambda x: tuple(op(x) for op in OPS.values()), torch.randn(5, 8), names=tuple(OPS), ambient=cast())


def test_what_cannot_be_told_is_refused_and_not_guessed() -> None:
    traced = trace_module(lambda x: x @ W, torch.randn(5, 8))
    gm = capture(traced.gm, traced.args, traced.inputs).gm
    matmul = next(n for n in gm.graph.nodes if n.target is fx.aten.matmul.default)
    matmul.meta["val"] = fx.need(matmul).to(F64)  # nothing that autocast does gives this
    with pytest.raises(
        CaptureError, match=r"matmul \(aten\.matmul\.default, test_materialize_casts\.py:\d+\).*enabled=False"
    ):
        materialize_casts(gm, Facts((), autocast=(("cpu", BF16),)))


def test_a_weight_that_two_ops_share_is_cast_for_each(x: Tensor) -> None:
    graph = compare(Net(), x, ambient=cast())
    weight = next(n for n in fx.placeholders(graph.gm) if n.name == "qkv_weight")
    assert [str(user.target) for user in weight.users] == ["aten._to_copy.default"] * 2


class Routed(nn.Module):
    """Our operator between a router and a weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up = nn.ParameterList(torch.randn(6, 8) for _ in range(3))
        self.down = nn.ParameterList(torch.randn(8, 6) for _ in range(3))
        self.bias = nn.ParameterList(torch.randn(6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        experts = torch.ops.moeca.experts
        y = experts(x, ids, [*self.up], [*self.down], [], [*self.bias], [], [], "silu")
        return (y * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_experts_are_cast_like_the_linears_they_stand_for(dtype: torch.dtype) -> None:
    graph = compare(Routed(), torch.randn(5, 8), ambient=cast(dtype))
    (experts,) = (n for n in graph.gm.graph.nodes if fx.is_experts(n))
    assert {fx.need(source).dtype for source in experts.all_input_nodes} == {dtype, torch.int64}


def test_float64_experts_are_not_cast() -> None:
    graph = compare(Routed().double(), torch.randn(5, 8, dtype=F64), ambient=cast())
    assert "aten._to_copy.default" not in ops(graph.gm)


def test_experts_in_a_disabled_region_are_not_cast() -> None:
    class Disabled(Routed):
        def forward(self, x: Tensor) -> Tensor:
            with cast(enabled=False):
                return super().forward(x)

    graph = compare(Disabled(), torch.randn(5, 8), ambient=cast())
    assert "aten._to_copy.default" not in ops(graph.gm)


@pytest.mark.slow
def test_a_compiled_model_under_autocast_is_bitwise_that_of_eager(x: Tensor) -> None:
    """The casts are in its graphs: the ambient autocast must not cast once more, least of all where it was off."""
    net = Inside(lambda: cast(enabled=False))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with cast(enabled=False):
                return self.net.out(self.net(x).float())

    torch._dynamo.reset()
    model = Model()
    compiled = moeca.compile(model, schedule="full", inner="eager")
    for dtype in (None, BF16, F16):
        with quiet(), torch.no_grad(), nullcontext() if dtype is None else cast(dtype):
            assert same(compiled(x), model(x))


def test_a_graph_captured_under_one_autocast_holds_under_another(x: Tensor) -> None:
    """The casts of a capture are those of its own signature, not of the moment it is made."""
    with quiet():
        plain, args = capture_module(Net(), x)
        with cast():
            half, half_args = capture_module(Net(), x)
    assert "aten._to_copy.default" not in ops(plain.gm)
    assert ops(half.gm)["aten._to_copy.default"] > 3
    assert len(args) == len(half_args)


@pytest.mark.parametrize("regions", [(), (cast,)], ids=["nothing", "a region"])
@pytest.mark.parametrize("outside", [None, BF16], ids=["plain", "bf16"])
def test_the_pass_manager_checks_it_and_says_whether_it_changed_the_graph(
    x: Tensor, regions: tuple[Callable[[], AbstractContextManager[Any]], ...], outside: torch.dtype | None
) -> None:
    with quiet(), nullcontext() if outside is None else cast(outside):
        record, *_ = analyze_module(Inside(*regions), x).records
    assert record.name == "materialize_casts"
    assert record.modified is bool(regions or outside)


def test_the_capture_has_no_casts_yet_and_stays_as_it_is(x: Tensor) -> None:
    with quiet(), cast():
        traced = trace_module(Inside(cast), x)
        captured = capture(traced.gm, traced.args, traced.inputs)
    before = str(captured)
    assert captured.autocast == (("cpu", BF16),)
    assert "_enter_autocast" in before
    assert "dtype = torch.bfloat16)" not in before
    facts = Facts(captured.inputs, autocast=captured.autocast)
    PassManager().rewrite([materialize_casts], captured.gm, facts)
    assert str(captured) == before


def test_it_cannot_be_left_out() -> None:
    with pytest.raises(OptionError, match=r"disable=\['materialize_casts'\]: only \['drop_noops'"):
        analyze_module(Net(), torch.randn(2, 2, 4, 4), options=Options(inner="eager", disable=("materialize_casts",)))


class TakesAbove(nn.Module):
    """Takes the rows whose score is above a threshold: how many they are depends on data"""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(8, 1), nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.score(x)[:, 0].sigmoid() > 0.5).nonzero()[:, 0]
        return x.index_add(0, rows, self.out(x[rows]).float())


def test_a_cast_of_what_has_as_many_rows_as_data_says_has_the_size_that_was_noted() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = compare(TakesAbove(), torch.randn(5, 8), ambient=cast())
    casts = [node for node in graph.gm.graph.nodes if str(node.target) == "aten._to_copy.default"]
    sizes = {fx.shape(node) for node in casts if fx.has_unknown_size(node)}
    assert len(sizes) == 1
