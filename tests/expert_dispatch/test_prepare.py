"""What `prepare` promises about a whole model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from examples.dit_moe import dit_moe, randomize_
from moeca_compile.expert_dispatch import PreparedModule, prepare, prepared, unprepare
from tests.expert_dispatch.test_dispatch import compiled
from tests.models import DiT

DISPATCHES = {"numpy": "numpy_loop", "nonzero": "nonzero_loop", "hf": "nonzero_loop", "where": "nonzero_loop"}
STYLES = pytest.mark.parametrize("style", DISPATCHES)
FORMS = pytest.mark.parametrize("style", ["numpy", "hf"])  # a method replaced as a whole, and a loop inside a forward
Inputs = tuple[Tensor, Tensor, Tensor]


def model_of(style: str, seed: int = 0, depth: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return DiT(style, depth=depth).eval().requires_grad_(False)


def inputs_of(dtype: torch.dtype = torch.float32, n: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 8, 8, generator=generator).to(dtype), torch.full((n,), 500.0), torch.arange(n)


@STYLES
def test_whole_model_is_one_graph_and_eager_is_untouched(style: str) -> None:
    model, inputs = model_of(style), inputs_of()
    wanted = model(*inputs)
    report = prepare(model)
    where = "moe.experts" if style == "nonzero" else "moe"
    assert report.changed == (
        PreparedModule(f"blocks.0.{where}", DISPATCHES[style], 4, "silu", gated=True, verified=True),
    )
    assert not report.rejected
    assert torch.equal(model(*inputs), wanted)
    got, calls = compiled(model, *inputs)
    assert calls == ["moeca.experts"]
    torch.testing.assert_close(got, wanted)


def test_dense_model_needs_nothing() -> None:
    model, inputs = model_of("dense"), inputs_of()
    report = prepare(model)
    assert not report.changed
    assert not report.rejected
    assert str(report) == "prepared 0 MoE modules, left 0 alone"
    assert compiled(model, *inputs)[1] == []


@pytest.mark.parametrize("slices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_example_model(slices: int) -> None:
    model = randomize_(
        dit_moe("S/2-8E2A", depth=2, hidden_size=32, num_heads=2, input_size=8, num_classes=10, pretraining_tp=slices)
    ).eval()
    inputs = inputs_of()
    with torch.no_grad():
        wanted = model(*inputs)
        report = prepare(model)
        assert [one.path for one in report.changed] == ["blocks.0.moe", "blocks.1.moe"]
        assert not report.rejected  # not even for moe_train, which only training reaches
        got, calls = compiled(model, *inputs)
    assert calls == ["moeca.experts"] * 2
    torch.testing.assert_close(got, wanted)


@FORMS
def test_twice_and_back(style: str) -> None:
    model, inputs = model_of(style), inputs_of()
    dicts = [set(vars(module)) for module in model.modules()]
    first = prepare(model)
    assert prepared(model) == first.changed
    again = prepare(model)
    assert not again.changed
    assert not again.rejected
    assert unprepare(model) == len(first.changed)
    assert not prepared(model)
    assert [set(vars(module)) for module in model.modules()] == dicts
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(model, *inputs)
    assert unprepare(model) == 0


@STYLES
def test_nothing_else_about_the_model_changes(style: str) -> None:
    model = model_of(style).train().requires_grad_()
    parameters = list(model.parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    prepare(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(values) == list(model.state_dict())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_training_runs_the_original() -> None:
    model, inputs = model_of("hf").train(), inputs_of()
    prepare(model)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(model, *inputs)
    model.requires_grad_()
    model(*inputs).square().mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.slow
@FORMS
def test_a_deep_copy_uses_its_own_weights(style: str) -> None:
    model, inputs = model_of(style), inputs_of()
    prepare(model)
    other = copy.deepcopy(model)
    assert prepared(other) == prepared(model)
    for p in other.parameters():
        p.mul_(1.25)
    for one in (other, model):
        torch.testing.assert_close(compiled(one, *inputs)[0], one(*inputs))
    assert not torch.allclose(other(*inputs), model(*inputs))
    unprepare(other)
    assert prepared(model)


@FORMS
def test_instances_share_one_graph_but_not_weights(style: str) -> None:
    models, inputs, graphs = [model_of(style, seed) for seed in range(3)], inputs_of(), []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    fast = [torch.compile(model, backend=backend, fullgraph=True) for model in models if prepare(model).changed]
    assert len(fast) == 3
    for _ in range(2):
        for model, one in zip(models, fast, strict=True):
            torch.testing.assert_close(one(*inputs), model(*inputs))
    assert len(graphs) == 1


@FORMS
def test_loaded_and_replaced_weights_are_followed(style: str) -> None:
    model, other, inputs = model_of(style), model_of(style, seed=5), inputs_of()
    prepare(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    fast(*inputs)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(*inputs), other(*inputs))
    third = model_of(style, seed=6)
    model.load_state_dict(third.state_dict(), assign=True)
    torch.testing.assert_close(fast(*inputs), third(*inputs))


def test_pickling_gives_a_plain_model_that_can_be_prepared() -> None:
    model, inputs, file = model_of("numpy"), inputs_of(), io.BytesIO()
    prepare(model)
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert not prepared(loaded)
    assert len(prepare(loaded).changed) == 1
    assert len(compiled(loaded, *inputs)[1]) == 1


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(style: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(style).to(dtype), inputs_of(dtype)
    assert [one.verified for one in prepare(model).changed] == [True]
    torch.testing.assert_close(compiled(model, *inputs)[0], model(*inputs), rtol=0.05, atol=0.02)


@FORMS
def test_autocast_gives_the_same_dtypes(style: str) -> None:
    model, inputs = model_of(style), inputs_of()
    prepare(model)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, __, result: seen.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(*inputs)
        eager, seen[:] = list(seen), []
        got, _ = compiled(model, *inputs)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert set(seen) == set(eager)


@STYLES
def test_meta_device_is_prepared_but_not_verified(style: str) -> None:
    with torch.device("meta"):
        model = DiT(style, depth=1).eval()
    report = prepare(model)
    assert [one.verified for one in report.changed] == [False]
    assert "not verified on its own weights" in str(report)
    assert all(p.is_meta for p in model.parameters())
    real = model_of(style)
    model.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(compiled(model, *inputs_of())[0], real(*inputs_of()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.export itself
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model, inputs = model_of("hf"), inputs_of()
    prepare(model)
    program = torch.export.export(model, inputs, strict=strict)
    assert sum("moeca.experts" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.slow
@FORMS
def test_other_batch_sizes_need_one_more_graph_at_most(style: str) -> None:
    model, graphs = model_of(style), []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    prepare(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for n in (2, 3, 5):
        torch.testing.assert_close(fast(*inputs_of(n=n)), model(*inputs_of(n=n)))
    assert len(graphs) <= 2


def test_report_of_a_model_with_a_miss() -> None:
    model = model_of("hf", depth=2)
    model.blocks[1].moe.experts[0].gate_proj.register_forward_hook(lambda *_: None)
    text = str(prepare(model))
    assert text.startswith("prepared 1 MoE modules, left 1 alone\n  nonzero_loop     4 experts  silu gated")
    assert "blocks.1.moe (models.py:" in text
    assert (
        "expert 0 has a forward hook (test_report_of_a_model_with_a_miss.<locals>.<lambda>) on gate_proj: take it"
        in text
    )


def test_the_root_itself_may_be_the_layer() -> None:
    layer, x = model_of("hf").blocks[0].moe, torch.randn(2, 7, 32)
    assert [one.path for one in prepare(layer).changed] == [""]
    torch.testing.assert_close(compiled(layer, x)[0], layer(x))
    assert "(root)" in str(prepare(unprepared(layer)))


def unprepared(model: nn.Module) -> nn.Module:
    unprepare(model)
    return model
