"""Which dispatch styles are recognized, which are left alone, and that the reason is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch import layers
from tests.facts import Recorder, named_by_docstring


def compiled(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[str]]:
    """The result under Dynamo with fullgraph, and its calls of our operator."""
    calls: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in gm.graph.nodes if "moeca" in str(node.target))
        return gm

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)(*inputs), calls


def inputs_of(layer: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, layers.WIDTH, generator=generator)
    return (x, torch.randn(2, layers.WIDTH, generator=generator)) if isinstance(layer, layers.Conditioned) else (x,)


@pytest.mark.parametrize(
    ("style", "where", "family"),
    [
        (layers.OneHot, "(root)", "nonzero_loop"),
        (layers.Outputs, "(root)", "numpy_loop"),
        (layers.Batched, "(root)", "nonzero_loop"),
        (layers.Swapped, "(root)", "nonzero_loop"),
        (layers.Container, "experts", "nonzero_loop"),
        (layers.SlotBySlot, "(root)", "nonzero_loop"),
        (layers.Masked, "(root)", "nonzero_loop"),
        (layers.TopOne, "(root)", "nonzero_loop"),
        (layers.Viewed, "(root)", "nonzero_loop"),
        (layers.Base, "(root)", "nonzero_loop"),
        (layers.Private, "(root)", "nonzero_loop"),
        (layers.Listed, "(root)", "nonzero_loop"),
        (layers.Conditioned, "(root)", "nonzero_loop"),
    ],
)
def test_recognized(style: type[nn.Module], where: str, family: str, fact: Recorder) -> None:
    torch.manual_seed(0)
    layer = style().eval()
    inputs = inputs_of(layer)
    with torch.no_grad():
        wanted = layer(*inputs)
        report = prepare(layer)
        assert not report.rejected
        (one,) = report.changed
        assert (one.path or "(root)", one.family, one.num_experts) == (where, family, layers.EXPERTS)
        assert (one.activation, one.gated, one.verified) == ("silu", True, True)
        got, calls = compiled(layer, *inputs)
        assert calls == ["moeca.experts"]
        torch.testing.assert_close(got, wanted)
        assert torch.equal(layer(*inputs), wanted)
    fact("dispatch", named_by_docstring(style), family=family, result="rewritten")


@pytest.mark.parametrize(
    ("style", "reason"),
    [
        (layers.Capacity, "its result is not the gate-weighted sum of each token's experts"),
        (layers.Counting, "it changes the module's own state (load), which a compiled graph would drop"),
        (layers.Squared, "its result is not the gate-weighted sum of each token's experts"),
        (layers.Decorated, "forward is decorated with doubled, which a rewritten one would lose"),
    ],
)
def test_left_alone_with_a_reason(style: type[nn.Module], reason: str, fact: Recorder) -> None:
    fact("dispatch", named_by_docstring(style), result=f"left alone: {reason}")
    torch.manual_seed(0)
    layer = style().eval()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    report = prepare(nn.ModuleDict({"moe": layer}))
    assert not report.changed
    (miss,) = report.rejected
    assert reason in miss.reason
    assert f"{style.__name__}." in miss.reason
    assert "Write it as a method" in miss.reason
    assert miss.node == "moe"
    assert miss.where.startswith("layers.py:")
    assert "forward" not in vars(layer)
    assert "dispatch" not in vars(layer)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_miss_names_the_line_of_the_loop() -> None:
    (miss,) = prepare(layers.Squared()).rejected
    name, line = miss.where.split(":")
    assert name == "layers.py"
    with open(layers.__file__) as source:
        assert "for e, expert in enumerate(self.experts):" in source.read().splitlines()[int(line) - 1]


@pytest.mark.parametrize("style", [layers.Stacked, layers.StaticSlices, layers.TrainingLoop])
def test_needs_no_rewriting(style: type[nn.Module], fact: Recorder) -> None:
    fact("dispatch", named_by_docstring(style), result="traceable as it is")
    report = prepare(style())
    assert not report.changed
    assert not report.rejected


def test_what_holds_for_one_instance_is_not_assumed_of_the_next() -> None:
    report = prepare(nn.Sequential(*(layers.Optional(sparse) for sparse in (False, True, False, True))))
    assert [one.path for one in report.changed] == ["1", "3"]
    assert not report.rejected


def test_a_method_replaced_on_the_instance_is_left_alone() -> None:
    layer = layers.OneHot()
    layer.dispatch = lambda x, ids, weights: x
    (miss,) = prepare(layer).rejected
    assert "dispatch was replaced on this instance" in miss.reason
    assert layer.dispatch(1, 2, 3) == 1


def test_code_built_at_run_time_is_left_alone() -> None:
    space: dict[str, object] = {"Layer": layers.Layer, "torch": torch}
    exec(
        "class Built(Layer):\n"
        " def dispatch(self, x, ids, weights):\n"
        "  out = torch.zeros_like(x)\n"
        "  for e, expert in enumerate(self.experts):\n"
        "   token, slot = torch.where(ids == e)\n"
        "   out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])\n"
        "  return out\n",
        space,
    )
    report = prepare(space["Built"]())  # type: ignore[operator]
    assert not report.changed
    (miss,) = report.rejected
    assert "has no source that can be read" in miss.reason
