"""Branches on whether a mask picks anything: straightened where that is the same, left alone where it isn't."""

from __future__ import annotations

import ast
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare, unprepare
from moeca_compile.expert_dispatch.source.method_source import read, rebuild
from moeca_compile.expert_dispatch.source.straighten import guards, straighten
from tests.expert_dispatch import branching
from tests.expert_dispatch.branching import NULL
from tests.expert_dispatch.layers import WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.facts import Recorder, named_by_docstring

LABELS = {"some": (1, NULL, 3), "none": (1, 2, 3), "all": (NULL, NULL, NULL)}


def tokens() -> Tensor:
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (branching.Prototypes, ["moeca.experts"]),
        (lambda: branching.Prototypes(top_k=2, score="softmax"), ["moeca.experts"]),
        (lambda: branching.Prototypes(null=0), ["moeca.experts"]),
        (branching.Inline, ["moeca.experts"]),
        (branching.Choosers, []),
    ],
)
def test_one_graph_for_every_mixture_of_labels(make: Callable[[], nn.Module], calls: list[str], fact: Recorder) -> None:
    torch.manual_seed(0)
    layer, x = make().eval(), tokens()
    result = "rewritten" if calls else "rewritten; every expert runs on every token"
    fact("dispatch", named_by_docstring(type(layer)), family="masked_branches", result=result)
    null = layer.null
    with torch.no_grad():
        wanted = {k: layer(x, _labels(k, null)) for k in LABELS}
        (one,) = prepare(layer).changed
        assert (one.family, one.path, one.num_experts, one.verified) == ("masked_branches", "", 4, True)
        assert one.dense == (not calls)
        graphs: list[torch.fx.GraphModule] = []

        def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            graphs.append(gm)
            return gm

        torch._dynamo.reset()
        fast = torch.compile(layer, backend=backend, fullgraph=True)
        for kind in LABELS:
            torch.testing.assert_close(fast(x, _labels(kind, null)), wanted[kind])
            assert all(
                torch.equal(a, b)
                for a, b in zip(_tensors(layer(x, _labels(kind, null))), _tensors(wanted[kind]), strict=True)
            )
    assert [str(n.target) for gm in graphs for n in gm.graph.nodes if "moeca" in str(n.target)] == calls
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_loop_inside_a_branch_whose_loss_only_training_wants(fact: Recorder) -> None:
    torch.manual_seed(0)
    layer, x = branching.Nested().eval(), tokens()
    fact("dispatch", named_by_docstring(branching.Nested), family="masked_branches", result="rewritten")
    (one,) = prepare(layer).changed
    assert (one.family, one.num_experts, one.dense) == ("masked_branches", 3, False)
    fast = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for kind in LABELS:
            for call in ({"with_loss": False}, {"labels": _labels(kind, NULL), "with_loss": False}):
                args = (x,) if "labels" in call else (x, _labels(kind, NULL))
                wanted = layer(*args, **call)
                torch.testing.assert_close(fast(*args, **call), wanted)
        torch.testing.assert_close(fast(x, _labels("some", NULL), False), layer(x, _labels("some", NULL), False))
        with pytest.raises(torch._dynamo.exc.Unsupported):  # the original code, which no proof speaks of
            fast(x, _labels("some", NULL))
        parts = torch.compile(layer, backend="eager")
        torch.testing.assert_close(parts(x, _labels("some", NULL)), layer(x, _labels("some", NULL)))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (branching.LoopArguments, {"halve": True}),
        (branching.LoopArguments, {"scale": torch.arange(27.0)}),
        (branching.HelperArguments, {"halve": True}),
        (branching.HelperArguments, {"scale": 2.0}),
    ],
)
def test_what_the_loop_is_told_isnt_lost(kind: type[nn.Module], arguments: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer, x = kind().eval(), tokens()
    assert len(prepare(layer).changed) == 1
    fast = torch.compile(layer, backend="eager")
    with torch.no_grad():
        assert not torch.equal(layer(x, **arguments), layer(x))
        torch.testing.assert_close(fast(x), layer(x))
        torch.testing.assert_close(fast(x, **arguments), layer(x, **arguments))


@pytest.mark.parametrize("kind", [branching.OrExtra, branching.Unreached])
@pytest.mark.slow
def test_a_branch_that_no_proof_came_to_stays(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = kind().eval()
    assert len(prepare(layer).changed) == 1
    fast = torch.compile(layer, backend="eager")
    with torch.no_grad():
        for mixture, call in product(LABELS, ({}, {"extra": torch.ones(1)})):
            args = tokens(), _labels(mixture, NULL)
            torch.testing.assert_close(fast(*args, **call), layer(*args, **call))


def test_an_else_that_computes_isnt_dropped() -> None:
    torch.manual_seed(0)
    layer, x = branching.Otherwise().eval(), tokens()
    report = prepare(layer)
    assert not report.changed
    assert "its result is not the same without the branch" in str(report)
    fast = torch.compile(layer, backend="eager")
    with torch.no_grad():
        for kind in LABELS:
            torch.testing.assert_close(fast(x, _labels(kind, NULL)), layer(x, _labels(kind, NULL)))


def _labels(kind: str, null: int) -> Tensor:
    return torch.tensor([null if label == NULL else label for label in LABELS[kind]])


def _tensors(result: object) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, Tensor)]


@pytest.mark.parametrize(
    ("make", "line", "reason"),
    [
        (branching.Averaged, "if cond.any():", "its result is not the same without the branch"),
        (branching.Thresholded, "if loud.any():", "no way to run forward(x) is known that fills and empties the mask"),
    ],
)
def test_left_alone_with_the_line_and_a_remedy(
    make: Callable[[], nn.Module], line: str, reason: str, fact: Recorder
) -> None:
    layer = make().eval()
    fact("dispatch", named_by_docstring(type(layer)), result=f"left alone: {reason}")
    report = prepare(layer)
    assert not report.changed
    (miss,) = report.rejected
    assert reason in miss.reason
    assert "torch.where(mask[:, None], new, old)" in miss.reason
    name, number = miss.reason.split("branch at ")[1].split(" ")[0].rstrip(".").split(":")
    assert name == "branching.py"
    with open(branching.__file__) as source:
        assert line in source.read().splitlines()[int(number) - 1]
    assert "forward" not in vars(layer)


def test_undone() -> None:
    layer = branching.Prototypes().eval()
    prepare(layer)
    assert not prepare(layer).changed
    assert unprepare(layer) == 1
    assert "forward" not in vars(layer)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(layer, tokens(), _labels("some", NULL))


def test_two_layers_share_one_graph() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(branching.Inline() for _ in range(2)).eval()
    assert len(prepare(model).changed) == 2
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    x, labels = tokens(), _labels("some", NULL)
    with torch.no_grad():
        for layer in model:
            torch.testing.assert_close(
                torch.compile(layer, backend=backend, fullgraph=True)(x, labels), layer(x, labels)
            )
    assert len(graphs) == 1


def test_a_router_with_a_hook_stays_a_call() -> None:
    """Its code can't be put into forward, for then the hook would be passed over; so the branch stays, and is told."""
    layer = nn.ModuleDict({"moe": branching.GShard()}).eval()
    layer["moe"].gate.register_forward_hook(lambda *_: None)
    assert not prepare(layer).changed


class Writes:
    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        out, most = torch.zeros_like(x), torch.zeros(x.shape[0])
        if mask.any():
            rows = mask.nonzero(as_tuple=True)[0]
            out[rows, 1:] = x[rows, 1:] * 2
            out[mask] += 1
            most[rows], spare = x[mask].max(-1)
            out.index_add_(0, rows, spare[:, None] * x[mask])
        if self is not None and (~mask).sum() > 0:
            (rows,) = torch.where(~mask)
            out[rows] -= 3
        for _ in range(2):
            if mask.any():
                out = out + 1
        if mask.sum() > 2:
            out = -out
        return out + most[:, None]


@pytest.mark.parametrize("picked", [(), (0, 2), (0, 1, 2, 3, 4)])
def test_kinds_of_masked_writes(picked: tuple[int, ...]) -> None:
    source = read(Writes.run)
    assert source is not None
    assert len(guards(source)) == 2  # neither the one in a loop nor the one that counts
    straight = straighten(source)
    assert straight is straighten(source)
    assert ast.unparse(straight.tree).count(".any()") == 1
    x, mask = torch.randn(5, 3), torch.zeros(5, dtype=torch.bool)
    mask[list(picked)] = True
    torch.testing.assert_close(rebuild(straight, straight.tree, {})(Writes(), x, mask), Writes().run(x, mask))


def test_nothing_to_straighten() -> None:
    source = read(_labels)
    assert source is not None
    assert straighten(source) is source
