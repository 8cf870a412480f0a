"""Experts with packed weights: equal to the plain form, and never those of other or older weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.engine import adjacent
from moeca_compile.errors import MoecaWarning, OptionError
from moeca_compile.graph.content import SHARES
from moeca_compile.ops import packed
from moeca_compile.ops.experts import segments
from moeca_compile.ops.packed import Packs
from tests.sampling import Taped, compiled, dit, plain, run

D, HIDDEN, EXPERTS = 16, 24, 3


@pytest.fixture(autouse=True)
def _pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 0)


def layer(gated: bool, biased: bool, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    def lists(rows: int, *columns: int) -> list[Tensor]:
        return [torch.randn(rows, *columns, dtype=dtype) for _ in range(EXPERTS)]

    up, down = lists(HIDDEN, D), lists(D, HIDDEN)
    gate = lists(HIDDEN, D) if gated else []
    biases = [lists(HIDDEN), lists(D), lists(HIDDEN) if gated else []] if biased else [[], [], []]
    return [up, down, gate, *biases]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_experts_are_the_plain_ones(gated: bool, biased: bool) -> None:
    torch.manual_seed(0)
    weights, packs = layer(gated, biased), Packs()
    for tokens in (1, 5, 40):
        x, idx = torch.randn(tokens, D), torch.randint(0, EXPERTS - 1, (tokens, 2))  # the last expert gets none
        truth = segments(x, idx, *weights, "silu")
        with packs.active():
            found = segments(x, idx, *weights, "silu")
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-4)
    assert len(packs.layers) == 1


def test_weights_that_can_not_be_packed_run_as_they_are() -> None:
    weights, packs = layer(True, False, torch.float64), Packs()
    x, idx = torch.randn(4, D, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.int64)
    with packs.active():
        assert torch.equal(segments(x, idx, *weights, "silu"), segments(x, idx, *weights, "silu"))
    assert packs.layers == {}


def test_small_weights_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", D * HIDDEN + 1)
    weights, packs = layer(True, True), Packs()
    x, idx = torch.randn(4, D), torch.zeros(4, 1, dtype=torch.int64)
    truth = segments(x, idx, *weights, "silu")
    with packs.active():
        assert torch.equal(segments(x, idx, *weights, "silu"), truth)
        monkeypatch.setattr(packed, "SMALLEST", D * HIDDEN)
        segments(x, idx, *weights, "silu")
    assert len(packs.layers) == 1  # of the second call


def test_packs_are_used_where_they_are_active_and_nowhere_else() -> None:
    outer, inner = Packs(), Packs()
    assert packed.current() is None
    with outer.active():
        with inner.active():
            assert packed.current() is inner
        assert packed.current() is outer
    assert packed.current() is None


def test_a_write_past_the_version_counter_is_found_when_it_is_doubted() -> None:
    weights, packs = layer(True, False), Packs()
    first = packs.of(*weights)
    assert packs.of(*weights) is first
    packs.mark_unverified()
    assert packs.of(*weights) is first
    weights[0][1].data[0, 0] += 1
    packs.mark_unverified()
    assert packs.of(*weights) is not first


def test_a_write_past_the_version_counter_to_whole_weights_is_found_at_the_next_use() -> None:
    torch.manual_seed(0)
    up, down = ([torch.randn(256, 256) for _ in range(EXPERTS)] for _ in range(2))
    weights: list[list[Tensor]] = [up, down, [], [], [], []]
    packs = Packs()
    first = packs.of(*weights)
    assert packs.of(*weights) is first
    up[1].data.mul_(2)
    second = packs.of(*weights)
    assert second is not first
    down[2].numpy()[17, 3] += 1
    assert any(packs.of(*weights) is not second for _ in range(SHARES))


def test_rows_that_change_places_are_found_when_they_are_doubted() -> None:
    weights, packs = layer(True, False), Packs()
    first = packs.of(*weights)
    weights[0][0].data.copy_(weights[0][0].flip(0))
    packs.mark_unverified()
    assert packs.of(*weights) is not first


# -- compiled models --------------------------------------------------------------------------------------------------


def scaled(module: nn.Module) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)


def scaled_past_its_counter(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data.mul_(1.5)


def moved(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data = weight.data * 1.5


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(scaled, marks=pytest.mark.slow),
        scaled_past_its_counter,
        pytest.param(moved, marks=pytest.mark.slow),
    ],
)
def test_changed_weights_are_packed_again(change: Callable[[nn.Module], None]) -> None:
    module = dit()
    model = compiled(module, pack_experts=True)
    run(plain(model))
    change(module)
    for one, truth in zip(run(plain(model)), run(plain(compiled(copy.deepcopy(module)))), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-4, atol=1e-5)


def test_full_with_packed_experts_follows_weights_that_change_in_the_middle() -> None:
    module = dit()
    model = compiled(module, pack_experts=True, schedule="full")
    taped = Taped(model)
    for _ in plain(taped):
        with torch.no_grad():
            torch.testing.assert_close(taped.outputs[-1], module(*taped.inputs[-1]), rtol=1e-4, atol=1e-5)
        scaled_past_its_counter(module)


@pytest.mark.slow
def test_two_models_have_their_own() -> None:
    modules = [dit(seed) for seed in (0, 1)]
    models = [compiled(module, pack_experts=True) for module in modules]
    loops = [plain(model) for model in models]
    found = [[next(loops[i]) for _ in range(3)] for i in (0, 1)]
    for outputs, module in zip(found, modules, strict=True):
        for one, truth in zip(outputs, run(plain(compiled(copy.deepcopy(module))), 3), strict=True):
            torch.testing.assert_close(one, truth, rtol=1e-4, atol=1e-5)


def test_weights_that_are_made_anew_are_not_packed() -> None:
    model = compiled(dit(), pack_experts=True)
    with (
        pytest.warns(
            MoecaWarning, match="pack_experts is left out: experts computes with .*, which isn't a parameter: "
        ),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        run(plain(model), 1)


# -- on a GPU: side by side, tried here on the CPU ---------------------------------------------------------------------


@pytest.fixture
def grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adjacent, "DEVICES", {"cpu"})


class InBfloat16(nn.Module):
    """The model in bfloat16, between a latent and a prediction in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dit().bfloat16()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.model(x.bfloat16(), t, y)
        return result.float()


def storages(module: nn.Module) -> int:
    """Of all routed experts' weights."""
    weights = [one for name, one in module.named_parameters() if ".experts." in name]
    assert weights
    return len({one.untyped_storage().data_ptr() for one in weights})


@pytest.mark.usefixtures("grouping")
@pytest.mark.slow
def test_weights_move_into_one_storage_a_list_and_nothing_else_changes() -> None:
    module = InBfloat16()
    truth, before = copy.deepcopy(module), {name: id(one) for name, one in module.named_parameters()}
    model = compiled(module, schedule="uniform:2", pack_experts=True)
    found = run(plain(model))
    assert storages(truth) > storages(module) == 3  # gates, ups and downs of one layer
    assert {name: id(one) for name, one in module.named_parameters()} == before
    assert all(torch.equal(one, truth.state_dict()[name]) for name, one in module.state_dict().items())
    for one, other in zip(found, run(plain(compiled(truth, schedule="uniform:2"))), strict=True):
        assert torch.equal(one, other)
    assert not any(step.cold for step in moeca.stats(model).steps)  # moving them dropped no state


@pytest.mark.usefixtures("grouping")
def test_explaining_moves_nothing() -> None:
    module = InBfloat16()
    before = [one.data_ptr() for one in module.parameters()]
    moeca.explain(module, torch.zeros(2, 4, 8, 8), torch.ones(2), torch.tensor([1, 2]), pack_experts=True)
    assert [one.data_ptr() for one in module.parameters()] == before


@pytest.mark.usefixtures("grouping")
def test_weights_that_lie_side_by_side_stay_there() -> None:
    module = InBfloat16()
    run(plain(compiled(module, pack_experts=True)))
    before = [one.data_ptr() for one in module.parameters()]
    run(plain(compiled(module, pack_experts=True)))
    assert [one.data_ptr() for one in module.parameters()] == before


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("kept", ["float32", "a shared storage"])
def test_weights_that_no_grouped_multiply_takes_or_others_share_stay_where_they_are(kept: str) -> None:
    module: nn.Module = dit() if kept == "float32" else InBfloat16()
    if kept != "float32":
        flat = torch.nn.utils.parameters_to_vector(module.parameters())
        torch.nn.utils.vector_to_parameters(flat, module.parameters())
    before = [one.data_ptr() for one in module.parameters()]
    run(plain(compiled(module, pack_experts=True)), 1)
    assert [one.data_ptr() for one in module.parameters()] == before


def test_the_option_is_yes_or_no() -> None:
    with pytest.raises(OptionError, match="pack_experts='yes': expected True or False"):
        moeca.compile(dit(), pack_experts="yes")
