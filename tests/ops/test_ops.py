"""`moeca::experts` computes what its formula says, in every form, and stays one node for every tracer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.errors import UserError
from moeca_compile.ops import experts as ops

TOKENS, TOP_K, EXPERTS, WIDTH, HIDDEN, OUT = 13, 2, 4, 16, 24, 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h) ** 2,
    "sigmoid": torch.sigmoid,
    "identity": lambda h: h,
}
experts = torch.ops.moeca.experts


def experts_reference(
    x: Tensor, idx: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], gate: Sequence[Tensor],
    up_bias: Sequence[Tensor], down_bias: Sequence[Tensor], gate_bias: Sequence[Tensor], activation: str,
) -> Tensor:  # fmt: skip
    """The formula, one branch at a time."""
    act = ACTIVATIONS[activation]
    y = x.new_empty(*idx.shape, down[0].shape[0])
    for t, k in itertools.product(*map(range, idx.shape)):
        e = int(idx[t, k])
        h = F.linear(x[t], up[e], up_bias[e] if up_bias else None)
        h = act(F.linear(x[t], gate[e], gate_bias[e] if gate_bias else None)) * h if gate else act(h)
        y[t, k] = F.linear(h, down[e], down_bias[e] if down_bias else None)
    return y


def arguments(
    dtype: torch.dtype = torch.float32, gated: bool = True, biased: bool = False, activation: str = "silu",
    tokens: int = TOKENS, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def tensors(count: int, *shape: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(dtype) for _ in range(count)]

    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    up, down = tensors(EXPERTS, HIDDEN, WIDTH), tensors(EXPERTS, OUT, HIDDEN)
    gate = tensors(EXPERTS if gated else 0, HIDDEN, WIDTH)
    up_bias, down_bias = tensors(EXPERTS if biased else 0, HIDDEN), tensors(EXPERTS if biased else 0, OUT)
    gate_bias = tensors(EXPERTS if biased and gated else 0, HIDDEN)
    return x, idx, up, down, gate, up_bias, down_bias, gate_bias, activation


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    limit = TOLERANCE[wanted.dtype] * float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= limit


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_the_formula(dtype: torch.dtype, gated: bool, biased: bool) -> None:
    args = arguments(dtype, gated, biased)
    assert_close(experts(*args), experts_reference(*args))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(activation: str, gated: bool) -> None:
    args = arguments(torch.float64, gated, activation=activation)
    assert_close(experts(*args), experts_reference(*args))


def test_every_activation_has_a_reference() -> None:
    assert set(ops.ACTIVATIONS) == set(ACTIVATIONS)


def test_inputs_are_left_alone() -> None:
    args = arguments(activation="identity", gated=False)
    before = [args[0].clone(), args[1].clone(), *(w.clone() for w in args[2])]
    experts(*args)
    assert all(map(torch.equal, before, [args[0], args[1], *args[2]]))


def test_experts_without_tokens_and_repeated_ids() -> None:
    x, idx, *rest = arguments()
    idx = torch.full_like(idx, 3)
    assert_close(experts(x, idx, *rest), experts_reference(x, idx, *rest))


def test_no_tokens() -> None:
    assert experts(*arguments(tokens=0)).shape == (0, TOP_K, OUT)


def test_strided_inputs() -> None:
    _, idx, up, *rest = arguments()
    wide = torch.randn(TOKENS, 2 * WIDTH)
    fused = [torch.randn(2 * HIDDEN, WIDTH) for _ in up]
    args = wide[:, ::2], idx.t().contiguous().t(), [w[1::2] for w in fused], *rest
    assert_close(experts(*args), experts_reference(*args))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_form_matches_the_segments(gated: bool, biased: bool) -> None:
    args = arguments(torch.bfloat16, gated, biased)
    assert ops.can_group(args[0], args[2], args[3])
    assert_close(ops.grouped(*args), ops.segments(*args))


def test_grouped_form_with_idle_experts() -> None:
    x, idx, *rest = arguments(torch.bfloat16)
    idx = torch.full_like(idx, 2)
    assert_close(ops.grouped(x, idx, *rest), ops.segments(x, idx, *rest))


@pytest.mark.parametrize("change", ["dtype", "width", "tokens"])
def test_grouped_form_is_refused(change: str) -> None:
    x, _, up, down, *_ = arguments(torch.float16 if change == "dtype" else torch.bfloat16)
    x = x[:, :9] if change == "width" else x[:0] if change == "tokens" else x
    assert not ops.can_group(x, up, down)


def test_stacked_is_a_view_of_evenly_spaced_weights() -> None:
    packed = torch.randn(EXPERTS, 2 * HIDDEN, WIDTH)
    halves = [w[:HIDDEN] for w in packed.unbind(0)]
    assert ops.stacked(halves).data_ptr() == packed.data_ptr()
    assert torch.equal(ops.stacked(halves), torch.stack(halves))
    assert torch.equal(ops.stacked(halves[::-1]), torch.stack(halves[::-1]))
    apart = [h.clone() for h in halves]
    assert torch.equal(ops.stacked(apart), torch.stack(apart))
    assert ops.stacked(halves[:1]).data_ptr() == packed.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda(dtype: torch.dtype) -> None:
    args = arguments(dtype)
    x, idx, *lists, activation = args
    on_gpu = experts(x.cuda(), idx.cuda(), *([w.cuda() for w in ws] for ws in lists), activation)
    assert_close(on_gpu.cpu(), experts_reference(*args))


def test_autocast_casts_all_but_float64() -> None:
    args, exact = arguments(), arguments(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(*args).dtype == torch.bfloat16
        assert experts(*exact).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: (a[0], a[1] + EXPERTS, *a[2:]), r"expert id \d, but there are 4 experts"),
        (lambda a: (*a[:8], "swish"), "unknown activation 'swish'; known: silu"),
        (lambda a: (a[0].double(), *a[1:]), "x is torch.float64 and a weight torch.float32"),
        (lambda a: (a[0], a[1].int(), *a[2:]), "int64 ids"),
        (lambda a: (a[0][None], *a[1:]), r"x \[T, D\]"),
        (lambda a: (*a[:3], a[3][:2], *a[4:]), r"one weight per expert in each list, not \[4, 2, 4"),
    ],
)
def test_refusals(change: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        experts(*change(arguments()))


def test_negative_id_is_an_error() -> None:
    x, idx, *rest = arguments()
    with pytest.raises(RuntimeError):
        experts(x, idx - 1, *rest)


def test_grad_mode_does_not_break_it() -> None:
    x, idx, up, *rest = arguments()
    with torch.enable_grad():
        y = experts(x, idx, [w.requires_grad_() for w in up], *rest)
    assert_close(y.detach(), experts_reference(x, idx, up, *rest).detach())


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        x, idx, *lists, activation = arguments()
        y = experts(x, idx, *lists, activation)
        assert y.fake_mode is mode
    assert y.shape == (TOKENS, TOP_K, OUT)
    assert y.dtype == torch.float32


def test_fake_refuses_other_token_counts() -> None:
    with FakeTensorMode():
        x, idx, *rest = arguments()
        with pytest.raises(RuntimeError, match="13 tokens and ids 5"):
            experts(x, idx[:5], *rest)


class Layer(torch.nn.Module):
    """The operator between ordinary ones, with its weights as parameters."""

    def __init__(self) -> None:
        super().__init__()
        _, _, up, down, gate, *_ = arguments()
        self.up, self.down, self.gate = (torch.nn.ParameterList(ws) for ws in (up, down, gate))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        weights, ids = w.softmax(-1).topk(TOP_K)
        y = experts(x * 2, ids, list(self.up), list(self.down), list(self.gate), [], [], [], "silu")
        return (y * weights.unsqueeze(-1)).sum(1)


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "moeca" in str(node.target)]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_one_node(pre_dispatch: bool) -> None:
    layer, inputs = Layer(), (torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, EXPERTS))
    with torch.no_grad():
        graph = make_fx(layer, pre_dispatch=pre_dispatch)(*inputs)
        assert calls(graph.graph) == ["moeca.experts.default"]
        assert_close(graph(*inputs), layer(*inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer()
    with torch.no_grad():
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for tokens in (TOKENS, 5, 21):  # the second one makes the size dynamic
            inputs = torch.randn(tokens, WIDTH), torch.randn(tokens, EXPERTS)
            assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.export itself
@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_one_node(strict: bool) -> None:
    layer, inputs = Layer(), (torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, EXPERTS))
    with torch.no_grad():
        program = torch.export.export(layer, inputs, strict=strict)
        assert calls(program.graph) == ["moeca.experts.default"]
        assert calls(program.run_decompositions().graph) == ["moeca.experts.default"]
        assert_close(program.module()(*inputs), layer(*inputs))


def test_schema_and_fake_agree_with_the_kernel() -> None:
    with torch.no_grad():
        torch.library.opcheck(experts.default, arguments(biased=True), test_utils=("test_schema", "test_faketensor"))
