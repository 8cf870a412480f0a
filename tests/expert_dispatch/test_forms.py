"""Routing of whole samples; forms that need no rewriting; and forms that can't be rewritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch import forms, layers
from tests.expert_dispatch.layers import WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder, named_by_docstring


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 8, WIDTH, generator=generator), torch.randn(count, WIDTH, generator=generator)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (forms.BySample, "nonzero_loop"),
        (forms.BySortedSample, "numpy_loop"),
        (forms.BySampleDense, "nonzero_loop"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_routing_by_sample(make: Callable[[], nn.Module], family: str, count: int, fact: Recorder) -> None:
    fact("dispatch", named_by_docstring(make), family=family, result="rewritten")
    torch.manual_seed(0)
    layer = make().eval()
    with torch.no_grad():
        wanted = layer(*inputs(count))
        report = prepare(layer)
        assert [one.family for one in report.changed] == [family]
        assert not report.rejected
        got, calls = compiled(layer, *inputs(count))
    assert calls == ["moeca.experts"]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("make", [forms.Einsum, forms.StaticSplit, forms.StaticMask, layers.StaticSlices])
def test_traceable_as_it_is(make: Callable[[], nn.Module], fact: Recorder) -> None:
    fact("dispatch", named_by_docstring(make), result="traceable as it is")
    check_silent(make().eval(), inputs()[0])


def test_grouped_multiplication_is_traceable_as_it_is(fact: Recorder) -> None:
    fact("dispatch", named_by_docstring(forms.Grouped), result="traceable as it is, in bfloat16")
    check_silent(forms.Grouped().eval().bfloat16(), inputs()[0].bfloat16())


def check_silent(layer: nn.Module, x: Tensor) -> None:
    report = prepare(layer)
    assert not report.changed
    assert not report.rejected
    with torch.no_grad():
        got, calls = compiled(layer, x)  # raises where there is more than one graph
        torch.testing.assert_close(got, layer(x))
    assert calls == []


@pytest.mark.parametrize(
    ("make", "line", "reason"),
    [
        (forms.Opaque, "Parallel.apply(", "gives its experts' weights to Parallel, an autograd function that reads"),
        (
            forms.DynamicK,
            "for e, expert in enumerate(self.experts):",
            "experts that take a number of tokens read from the data (dynamic k) have no static form",
        ),
    ],
)
def test_left_alone_with_the_line(make: Callable[[], nn.Module], line: str, reason: str, fact: Recorder) -> None:
    report = prepare(make().eval())
    assert not report.changed
    (miss,) = report.rejected
    assert reason in miss.reason
    fact("dispatch", named_by_docstring(make), result=f"left alone: {reason}")
    with open(forms.__file__) as source:
        assert line in source.read().splitlines()[int(miss.where.split(":")[1]) - 1]


@pytest.mark.parametrize(("grouped", "rejected"), [(True, 0), (False, 1)])
def test_nucleus_is_told_only_where_its_loop_runs(grouped: bool, rejected: int) -> None:
    """diffusers' packed experts hold a loop over counts and a grouped multiplication; a setting chooses."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    report = prepare(module.SwiGLUExperts(16, 24, 4, use_grouped_mm=grouped).eval())
    assert not report.changed
    assert len(report.rejected) == rejected
