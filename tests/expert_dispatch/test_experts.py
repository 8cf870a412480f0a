"""Which expert bodies are recognized, by what they compute and not by any name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof.anatomy import ADAPTED
from moeca_compile.expert_dispatch.proof.experts import ExpertBody, ModuleExperts, Recognizer
from moeca_compile.ops.experts import segments

WIDTH, HIDDEN = 12, 20
Act = Callable[[Tensor], Tensor]


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)); the layers are registered in the order of `names`, which don't tell their roles."""

    def __init__(self, act: Act = F.silu, order: str = "gud", bias: bool = False, hidden: int = HIDDEN) -> None:
        super().__init__()
        shapes = {"g": (WIDTH, hidden), "u": (WIDTH, hidden), "d": (hidden, WIDTH)}
        for i, role in enumerate(order):
            self.add_module(f"w{i}", nn.Linear(*shapes[role], bias=bias))
        self.order, self.act = order, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, f"w{self.order.index(role)}") for role in "gud")
        return down(self.act(gate(x)) * up(x))


class Fused(nn.Module):
    """The first layer holds both halves."""

    def __init__(self, act: Act, first_is_gate: bool = True, interleaved: bool = False) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"in": nn.Linear(WIDTH, 2 * HIDDEN), "out": nn.Linear(HIDDEN, WIDTH + 3)})
        self.act, self.first_is_gate, self.interleaved = act, first_is_gate, interleaved

    def forward(self, x: Tensor) -> Tensor:
        h = self.net["in"](x)
        a, b = (h[:, ::2], h[:, 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        gate, up = (a, b) if self.first_is_gate else (b, a)
        return self.net["out"](self.act(gate) * up)


class Sliced(Gated):
    """Weights split in two and summed, as `pretraining_tp` does."""

    def forward(self, x: Tensor) -> Tensor:
        gates, ups = self.w0.weight.split(HIDDEN // 2), self.w1.weight.split(HIDDEN // 2)
        downs = self.w2.weight.split(HIDDEN // 2, dim=1)
        return sum(
            F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for g, u, d in zip(gates, ups, downs, strict=True)
        )


def mlp(act: nn.Module, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias), act, nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH, bias), nn.Dropout(0.1)
    )


class DownFirst(nn.Module):
    """The other way round, the shapes chain too, but then the tokens don't fit."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("make", "activation", "gated"),
    [
        (Gated, "silu", True),
        (lambda: Gated(order="dgu"), "silu", True),
        (lambda: Gated(order="ugd", bias=True), "silu", True),
        (lambda: Gated(F.gelu), "gelu", True),
        (lambda: Gated(tanh_gelu), "gelu_tanh", True),
        (lambda: Gated(torch.sigmoid), "sigmoid", True),
        (lambda: Gated(hidden=WIDTH), "silu", True),  # all three layers of one shape
        (Sliced, "silu", True),
        (lambda: Fused(F.silu), "silu", True),
        (lambda: Fused(F.gelu, first_is_gate=False), "gelu", True),
        (lambda: Fused(F.relu, interleaved=True), "relu", True),
        (lambda: mlp(nn.GELU()), "gelu", False),
        (lambda: mlp(nn.GELU("tanh"), bias=False), "gelu_tanh", False),
        (lambda: mlp(nn.ReLU()), "relu", False),
        (lambda: mlp(nn.SiLU()), "silu", False),
        (lambda: mlp(nn.Identity()), "identity", False),
        (DownFirst, "relu", False),
    ],
)
@pytest.mark.parametrize("zeroed", [False, True])
def test_recognized(make: Callable[[], nn.Module], activation: str, gated: bool, zeroed: bool) -> None:
    torch.manual_seed(0)
    experts = [make() for _ in range(3)]
    for p in (p for expert in experts for p in expert.parameters() if zeroed):
        nn.init.zeros_(p)  # what the weights are must not matter
    body = Recognizer().body_of(experts)
    assert isinstance(body, ExpertBody), body
    assert (body.activation, body.gate is not None) == (activation, gated)
    for p in (p for expert in experts for p in expert.parameters()):
        nn.init.normal_(p, std=0.5)
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        y = segments(x, torch.arange(3)[:, None], *body.weights(experts), body.activation)[:, 0]
        torch.testing.assert_close(y, torch.stack([e.eval()(x[i : i + 1])[0] for i, e in enumerate(experts)]))


def test_weights_are_views() -> None:
    expert = Fused(F.silu)
    body = Recognizer().body_of([expert, Fused(F.silu)])
    assert isinstance(body, ExpertBody)
    up, down, gate, *_ = body.weights([expert])
    assert down[0] is expert.net["out"].weight
    assert {up[0].data_ptr(), gate[0].data_ptr()} == {
        expert.net["in"].weight[:HIDDEN].data_ptr(),
        expert.net["in"].weight[HIDDEN:].data_ptr(),
    }


def test_meta_device_and_low_precision() -> None:
    with torch.device("meta"):
        on_meta = Recognizer().body_of([Gated(F.gelu), Gated(F.gelu)])
    half = Recognizer().body_of([Gated(F.gelu).half(), Gated(F.gelu).half()])
    assert isinstance(on_meta, ExpertBody)
    assert isinstance(half, ExpertBody)
    assert half == Recognizer().body_of([Gated(F.gelu), Gated(F.gelu)])
    assert on_meta != half  # it was proven without data
    assert replace(on_meta, anatomy=half.anatomy) == half


def test_probing_leaves_no_trace() -> None:
    experts = [mlp(nn.GELU()).train() for _ in range(2)]
    before = [p.clone() for e in experts for p in e.parameters()]
    random_state = torch.get_rng_state()
    Recognizer().body_of(experts)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, before, [p for e in experts for p in e.parameters()]))
    assert all(e.training and p.grad is None and p.requires_grad for e in experts for p in e.parameters())


class Odd(nn.Module):
    """One module for every way not to be an expert; `kind` says which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        if kind == "norm":
            self.norm = nn.LayerNorm(WIDTH)
        elif kind == "buffer":
            self.register_buffer("calls", torch.zeros(()))
        elif kind == "deep":
            self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        elif kind == "apart":
            self.b = nn.Linear(HIDDEN - 1, WIDTH - 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pair":
            return self.b(F.silu(self.a(x))), x
        h = F.silu(self.a(x))
        return self.b(torch.tanh(h) if self.kind == "tanh" else h)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Odd("norm"), r"expert 0 has a parameter outside its Linear layers \(norm.weight\)"),
        (lambda: Odd("buffer"), "expert 0 keeps a buffer in itself: only stateless experts"),
        (lambda: Odd("deep"), "expert 0 has 4 Linear layers, not the 2 or 3"),
        (lambda: nn.Linear(WIDTH, WIDTH), "expert 0 has 1 Linear layers, not the 2 or 3"),
        (lambda: Odd("apart"), r"expert 0 has Linear layers \[\(12, 20\), \(19, 11\)\] that don't chain"),
        (lambda: Odd("tanh"), "expert 0 computes something other than a"),
        (lambda: Odd("pair"), "expert 0 returns a tuple, not one tensor"),
    ],
)
def test_refused(make: Callable[[], nn.Module], reason: str) -> None:
    found = Recognizer().body_of([make(), make()])
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_hooks_are_refused() -> None:
    experts = [Gated(), Gated()]
    experts[1].w0.register_forward_hook(lambda *_: None)
    assert "expert 1 has a forward hook (test_hooks_are_refused.<locals>.<lambda>) on w0" in str(
        Recognizer().body_of(experts)
    )
    experts = [Gated(), Gated()]
    experts[0].forward = lambda x: x
    assert "expert 0 has a forward that was replaced on the instance on itself" in str(Recognizer().body_of(experts))


def test_what_quantized_weights_compute_is_their_body() -> None:
    """The body is proven on stand-ins; `condition` says that these weights are none that the operator takes."""
    experts = nn.ModuleList([Gated().to(torch.float8_e4m3fn), Gated().to(torch.float8_e4m3fn)])
    body = Recognizer().body_of(list(experts))
    assert isinstance(body, ExpertBody)
    assert body.activation == "silu"
    assert ModuleExperts(("experts",), body).condition(nn.ModuleDict({"experts": experts})) == ADAPTED


def test_whole_numbers_in_place_of_weights_are_refused() -> None:
    experts = [Gated(), Gated()]
    experts[0].w0.weight = nn.Parameter(torch.zeros(HIDDEN, WIDTH, dtype=torch.int8), requires_grad=False)
    assert "different shapes or dtypes" in str(Recognizer().body_of(experts))
    experts[1].w0.weight = experts[0].w0.weight
    assert "can't be run on tokens [n, D]" in str(Recognizer().body_of(experts))


def test_experts_that_differ_are_refused() -> None:
    assert "experts 0 and 1 have weights of different shapes" in str(Recognizer().body_of([Gated(), Gated(hidden=24)]))
    assert "experts 0 and 1 compute different functions" in str(Recognizer().body_of([Gated(), Gated(F.gelu)]))


def test_a_setting_that_does_not_matter_may_differ() -> None:
    experts = [Gated(), Gated()]
    for e, expert in enumerate(experts):
        expert.number = e
    assert isinstance(Recognizer().body_of(experts), ExpertBody)
