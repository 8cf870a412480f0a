"""A dispatch family of one's own: asked in its place, proven like any other, refused when it is wrong."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.errors import InvariantError, OptionError
from moeca_compile.expert_dispatch import (
    PAIRED,
    Candidate,
    Entry,
    Family,
    Harness,
    Loop,
    ModuleCode,
    PrepareReport,
    Rewrite,
    Routed,
    prepare,
    register,
    unregister,
    whole_method,
)
from tests.expert_dispatch.layers import EXPERTS, WIDTH, Layer, OneHot
from tests.expert_dispatch.test_dispatch import compiled


class Reduced(Layer):
    """A fold over the experts: there is no loop to be seen."""

    def share(self, e: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        token, slot = torch.where(ids == e)
        return torch.zeros_like(x).index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        shares = (self.share(e, x, ids, weights) for e in range(len(self.experts)))
        return functools.reduce(torch.add, shares)


class Folds(Family):
    """functools.reduce over the experts."""

    name = "folds"

    def match(self, code: ModuleCode) -> Iterable[Loop]:
        for name, source in code.sources(code.stacks):
            if any(isinstance(node, ast.Attribute) and node.attr == "reduce" for node in ast.walk(source.tree)):
                yield Loop(name, source, code.stacks[0])

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Any]:
        return whole_method(harness, loop, PAIRED)


class ByHand(Folds):
    """Its own calls, `body`, and its own evidence: tokens, ids and weights in `method`."""

    def __init__(self, body: str, method: str = "dispatch") -> None:
        self.body, self.method = body, method

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Any]:
        def arguments(harness: Harness, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(7, WIDTH, generator=generator).to(dtype)
            scores = torch.rand(7, EXPERTS, generator=generator).to(dtype)
            weights, ids = scores.topk(2)
            return (x, ids, weights) if self.method == "dispatch" else (x,)

        yield Candidate(
            Rewrite.with_body(loop, self.body, Routed(harness.experts, dtype="x")), Entry(self.method, arguments)
        )


@pytest.fixture(autouse=True)
def no_family_is_left() -> Iterator[None]:
    yield
    for name in ("folds", "second"):
        try:
            unregister(name)
        except OptionError:
            continue


def prepared_and_compared(layer: nn.Module) -> PrepareReport:
    """The report; compiled and plain results are those from before."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        report = prepare(layer)
        assert torch.equal(layer(x), expected)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=bool(report.changed))(x), expected)
    return report


def test_no_built_in_family_knows_the_form() -> None:
    report = prepared_and_compared(Reduced().eval())
    assert not report.changed
    assert not report.rejected


@pytest.mark.parametrize("family", [Folds(), ByHand("return _moeca_routed(self, x, ids, weights)")])
def test_a_family_of_ones_own(family: Family) -> None:
    assert register(family) is family
    layer = Reduced().eval()
    (module,) = prepared_and_compared(layer).changed
    assert (module.family, module.num_experts, module.activation, module.verified) == ("folds", EXPERTS, "silu", True)
    with torch.no_grad():
        assert compiled(layer, torch.randn(2, 5, WIDTH))[1] == ["moeca.experts"]
    unregister("folds")
    assert not prepare(Reduced().eval()).changed


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            ByHand("return _moeca_routed(self, x, ids, 2 * weights)"),
            "its result is not the gate-weighted sum of each token's experts",
        ),
        (ByHand("return _moeca_routed(self, x, ids)"), "the canonical form can't be run in its place (TypeError"),
        (ByHand("return _moeca_routed(self, x, ids, weights)", "route"), "route doesn't call dispatch"),
        (ByHand("return ("), "the family folds can't try it out (SyntaxError"),
    ],
)
def test_a_wrong_family_is_refused_and_the_model_runs(family: Family, reason: str) -> None:
    register(family)
    report = prepared_and_compared(Reduced().eval())
    assert not report.changed
    (rejected,) = report.rejected
    assert rejected.reason.startswith("the expert dispatch in Reduced.dispatch: ")
    assert reason in rejected.reason
    assert rejected.where.startswith("test_register.py:")


def test_the_order_decides() -> None:
    class Everything(Family):
        name = "second"

        def match(self, code: ModuleCode) -> Iterable[Loop]:
            return code.loops

        def propose(self, harness: Harness, loop: Loop) -> Iterator[Any]:
            return whole_method(harness, loop, PAIRED)

    register(Everything(), after="nonzero_loop")
    assert [module.family for module in prepare(OneHot().eval()).changed] == ["nonzero_loop"]
    unregister("second")
    register(Everything(), before="nonzero_loop")
    assert [module.family for module in prepare(OneHot().eval()).changed] == ["second"]


def test_a_family_that_raises_while_it_matches_is_named() -> None:
    class Broken(Folds):
        def match(self, code: ModuleCode) -> Iterable[Loop]:
            raise ValueError("no such thing")

    register(Broken())
    with pytest.raises(InvariantError, match=r"family folds raised while it matched \w+ \(ValueError: no such thing"):
        prepare(Reduced())


class Nameless(Folds):
    name = ""


@pytest.mark.parametrize(
    ("family", "places", "message"),
    [
        (SimpleNamespace(name="folds"), {}, "expected an object of a subclass of Family"),
        (Folds, {}, "expected an object of a subclass of Family"),
        (Nameless(), {}, "Nameless has no name"),
        (Folds(), {"before": "numpy_loop", "after": "gshard"}, "not both"),
        (Folds(), {"after": "nowhere"}, "no family 'nowhere'; there are masked_branches, gshard, numpy_loop, nonzero"),
    ],
)
def test_what_register_refuses(family: Any, places: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        register(family, **places)


def test_a_name_is_given_once() -> None:
    register(Folds())
    with pytest.raises(OptionError, match="there is a family folds already"):
        register(Folds())
    with pytest.raises(OptionError, match="no family 'gshard' is registered; registered are \\['folds'\\]"):
        unregister("gshard")
