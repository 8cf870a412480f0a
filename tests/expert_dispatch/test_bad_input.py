"""What isn't a mixture of experts, or is one that something else has its hands on."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch import prepare
from tests.expert_dispatch import bodies, branching, forms, layers
from tests.expert_dispatch.layers import EXPERTS, HIDDEN, WIDTH
from tests.expert_dispatch.test_dispatch import compiled
from tests.models import DiT, SwiGLU

STYLES = ("numpy", "hf")


def tokens() -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [forms.TwoLists, forms.HashTable])
def test_no_word_about_what_is_no_moe(make: type[nn.Module]) -> None:
    report = prepare(make().eval())
    assert not report.changed
    assert not report.rejected


def test_a_table_picked_by_masks_is_left_alone() -> None:
    layer = forms.HashLookup().eval()
    (miss,) = prepare(layer).rejected
    assert "expert 0 can't be run on tokens [n, D]" in miss.reason
    assert "forward" not in vars(layer)


def test_experts_of_different_shapes() -> None:
    layer = layers.OneHot().eval()
    layer.experts[2] = SwiGLU(WIDTH, HIDDEN + 8)
    (miss,) = prepare(layer).rejected
    assert "experts 0 and 2 have weights of different shapes" in miss.reason
    assert miss.where.startswith("layers.py:")


@pytest.mark.parametrize("make", [layers.OneHot, layers.Viewed, lambda: bodies.With(lambda _: bodies.Normed())])
def test_training_runs_the_original_bit_for_bit(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().train()
    wanted = layer(tokens())
    assert len(prepare(layer).changed) == 1
    assert torch.equal(layer(tokens()), wanted)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(tokens()), wanted)


def test_training_with_branches_runs_the_original() -> None:
    torch.manual_seed(0)
    layer, labels = branching.Inline().train(), torch.tensor([1, branching.NULL])
    wanted = layer(tokens(), labels)
    assert len(prepare(layer).changed) == 1
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(tokens(), labels), wanted)


def meta() -> Iterator[nn.Module]:
    yield layers.OneHot()
    yield branching.Prototypes()
    yield branching.Choosers()
    yield branching.GShard("all")
    yield forms.BySample()
    yield bodies.With(lambda _: bodies.Normed())


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.ModuleList(meta()).eval()
    report = prepare(model)
    assert [one.path for one in report.changed] == [str(i) for i in range(len(model))]
    assert not any(one.verified for one in report.changed)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_tied_experts(whole: bool) -> None:
    """Two experts that are one module, or that share their weights."""
    torch.manual_seed(0)
    layer = layers.OneHot().eval()
    if whole:
        layer.experts[3] = layer.experts[1]
    else:
        layer.experts[3].up_proj.weight = layer.experts[1].up_proj.weight
        layer.experts[2].down_proj.weight = layer.experts[0].down_proj.weight
    pointers = [p.data_ptr() for p in layer.parameters()]
    with torch.no_grad():
        wanted = layer(tokens())
        assert [one.num_experts for one in prepare(layer).changed] == [EXPERTS]
        got, calls = compiled(layer, tokens())
        torch.testing.assert_close(got, wanted)
        assert calls == ["moeca.experts"]
        layer.experts[1].up_proj.weight.mul_(1.5)
        torch.testing.assert_close(compiled(layer, tokens())[0], layer(tokens()))
    assert [p.data_ptr() for p in layer.parameters()] == pointers


@pytest.mark.parametrize("kind", ["forward", "pre", "inside"])
@pytest.mark.parametrize("body", [lambda _: SwiGLU(WIDTH, HIDDEN), lambda _: bodies.Deep()])
def test_hooks_on_experts_are_refused_loudly(kind: str, body: type[nn.Module]) -> None:
    layer = bodies.With(body).eval()
    expert = layer.experts[1]
    if kind == "inside":
        next(iter(expert.children())).register_forward_hook(lambda *_: None)
    elif kind == "pre":
        expert.register_forward_pre_hook(lambda *_: None)
    else:
        expert.register_forward_hook(lambda *_: None)
    report = prepare(layer)
    assert not report.changed
    assert "expert 1 has a forward hook (test_hooks_on_experts" in report.rejected[0].reason
    assert report.rejected[0].reason.endswith("take it off first")


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every tensor storage that can be reached from the model's modules, by address."""
    found: dict[int, int] = {}
    todo: list[object] = [vars(m) for m in model.modules()]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo.extend(value)
        elif hasattr(value, "__func__"):
            function = value.__func__
            todo.extend(cell.cell_contents for cell in function.__closure__ or ())
            todo.append(vars(function))
        elif hasattr(value, "__dataclass_fields__"):
            todo.extend(getattr(value, name) for name in value.__dataclass_fields__)
        elif callable(value):
            todo.extend(cell.cell_contents for cell in getattr(value, "__closure__", None) or ())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_parameters_keep_their_storage_and_memory_stays(style: str) -> None:
    torch.manual_seed(0)
    model = DiT(style, depth=2, dim=256, hidden=512, num_experts=8).eval()  # 28 MB
    before, values = storages(model), model.state_dict()
    pointers = {name: value.data_ptr() for name, value in values.items()}
    total = sum(before.values())
    prepare(DiT(style).eval())  # what Python itself keeps, code and caches, is there then
    tracemalloc.start()
    report = prepare(model)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(report.changed) == 2
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    assert storages(model) == before
    assert kept < 0.01 * total, (kept, total)
