"""Experts of every body through a dispatch: with sliced weights, and such as no operator holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch import bodies
from tests.expert_dispatch.layers import WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder, named_by_docstring


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu}


def tokens() -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(3))


def check(layer: nn.Module) -> list[str]:
    with torch.no_grad():
        wanted = layer(tokens())
        got, calls = compiled(layer, tokens())
        torch.testing.assert_close(got, wanted)
    return calls


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sliced_weights_are_those_of_an_mlp(act: str, gated: bool, bias: bool, fact: Recorder) -> None:
    torch.manual_seed(0)
    layer = bodies.With(lambda _: bodies.Sliced(ACTS[act], gated, bias, slices=2 + bias)).eval()
    (one,) = prepare(layer).changed
    assert (one.activation, one.gated, one.dense) == (act, gated, False)
    assert check(layer) == ["moeca.experts"]
    row = f"Body: {'gated ' if gated else ''}{act} MLP, its weights in slices"
    fact("dispatch", row, family="nonzero_loop", result="rewritten")


@pytest.mark.parametrize(
    "make",
    [
        lambda _: bodies.Normed(),
        lambda _: bodies.Scaled(),
        lambda _: bodies.Deep(),
        lambda _: bodies.Buffered(),
        lambda _: nn.Linear(WIDTH, WIDTH),
        lambda e: bodies.Sliced(F.gelu if e % 2 else F.silu, gated=False, bias=True),  # not one function
    ],
)
def test_any_other_body_runs_on_all_tokens(make: Callable[[int], nn.Module], fact: Recorder) -> None:
    torch.manual_seed(0)
    layer = bodies.With(make).eval()
    report = prepare(layer)
    (one,) = report.changed
    assert (one.activation, one.dense, one.verified) == ("any", True, True)
    assert "any body" in str(report)
    assert "every expert on every token" in str(report)
    assert check(layer) == []
    row = "Body: norms, learned scales, three layers or tables inside; another function for each expert"
    fact("dispatch", row, family=one.family, result="rewritten; every expert runs on every token")


def test_any_body_in_low_precision_and_on_meta() -> None:
    torch.manual_seed(0)
    layer = bodies.With(lambda _: bodies.Normed()).eval().bfloat16()
    assert [one.verified for one in prepare(layer).changed] == [True]
    x = tokens().bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer, x)[0], layer(x), rtol=0.05, atol=0.02)
    with torch.device("meta"):
        layer = bodies.With(lambda _: bodies.Normed()).eval()
    assert [one.verified for one in prepare(layer).changed] == [False]


def test_an_infinite_expert_reaches_only_its_own_tokens() -> None:
    torch.manual_seed(0)
    layer = bodies.With(lambda _: bodies.Deep()).eval()
    with torch.no_grad():
        layer.experts[2][-1].bias.fill_(float("inf"))
        prepare(layer)
        check(layer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bodies.Mixing, "expert 0 mixes tokens, or doesn't give the same twice"),
        (bodies.Counted, "expert 0 changes its own state (calls) while it runs"),
        (lambda: bodies.Deep().to(torch.float8_e4m3fn), "the original can't be run on random tokens"),
    ],
)
def test_left_alone(make: Callable[[], nn.Module], reason: str, fact: Recorder) -> None:
    fact(
        "dispatch",
        f"Body: {named_by_docstring(make) if isinstance(make, type) else 'float8 weights'}",
        result=f"left alone: {reason}",
    )
    report = prepare(bodies.With(lambda _: make()).eval())
    assert not report.changed
    assert reason in report.rejected[0].reason


def test_widths_that_differ() -> None:
    layer = bodies.With(lambda _: bodies.Deep())
    layer.experts[1] = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    assert "experts 0 and 1 have weights of different shapes" in prepare(layer).rejected[0].reason
