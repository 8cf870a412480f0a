"""The example DSMoE routes as described, is captured whole, and its committed checkpoint makes digits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moeca_compile as moeca
from examples import digits, dsmoe
from examples.dit_moe import randomize_
from examples.dsmoe import BiasGate, BiasRoutedMoE, DSMoE, DSMoEConfig

TINY = DSMoEConfig(
    hidden_size=16, depth=2, num_heads=2, num_experts=16, experts_per_token=4, expert_hidden=8, shared_hidden=8,
    input_size=8, in_channels=1, num_classes=10, learn_sigma=False,
)  # fmt: skip


def tiny() -> DSMoE:
    return randomize_(DSMoE(TINY), seed=1).eval().requires_grad_(False)


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(2))


def gate(bias: Tensor | None = None) -> BiasGate:
    found = tiny().blocks[0].moe.gate
    if bias is not None:
        found.e_score_correction_bias.copy_(bias)
    return found


def test_gate_weights_are_renormalised_sigmoids() -> None:
    ids, weights = gate()(tokens())
    scores = (tokens() @ gate().weight.T).sigmoid()
    best = scores.topk(4)
    assert torch.equal(ids.sort().values, best.indices.sort().values)
    expected = 2 * scores.gather(1, ids) / best.values.sum(1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_bias_takes_part_in_the_choice_only() -> None:
    """A bias that lifts experts 0 to 3 over all others: chosen everywhere, weighed by their own scores."""
    ids, weights = gate(torch.where(torch.arange(16) < 4, 2.0, 0.0))(tokens())
    assert torch.equal(ids.sort().values, torch.arange(4).expand(40, 4))
    scores = (tokens() @ gate().weight.T).sigmoid().gather(1, ids)
    torch.testing.assert_close(weights, 2 * scores / scores.sum(1, keepdim=True))


def test_balancing_moves_the_bias_against_the_load_in_training_only() -> None:
    one = gate(torch.where(torch.arange(16) < 4, 2.0, 0.0))
    before = one.e_score_correction_bias.clone()
    one(tokens())
    assert torch.equal(one.e_score_correction_bias, before)
    one.train()(tokens())
    moved = one.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.where(torch.arange(16) < 4, -0.001, 0.001))


def test_dispatch_sums_gated_branches_and_skips_idle_experts() -> None:
    moe, x = tiny().blocks[0].moe, tokens(6)
    ids = torch.tensor([[5, 1, 7, 2], [1, 5, 2, 7]]).repeat(3, 1)
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    by_hand = torch.stack(
        [sum(weights[t, k] * moe.experts[int(ids[t, k])](x[t]) for k in range(4)) for t in range(6)]
    )  # fmt: skip
    torch.testing.assert_close(moe.dispatch(x, ids, weights), by_hand, rtol=1e-4, atol=1e-5)


def test_fast_training_dispatch_agrees() -> None:
    pytest.importorskip("rich")
    from examples.train_digits import sorted_dispatch

    moe: BiasRoutedMoE = tiny().blocks[1].moe
    ids, weights = torch.rand(40, 12).topk(4).indices, torch.rand(40, 4)  # four experts get nothing
    expected = moe.dispatch(tokens(), ids, weights)
    torch.testing.assert_close(sorted_dispatch(moe, tokens(), ids, weights), expected, rtol=1e-4, atol=1e-5)


def test_training_reaches_every_parameter() -> None:
    model = tiny().train().requires_grad_(True)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    model(x, torch.linspace(10, 900, 8), torch.arange(8)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.slow
def test_trained_model_is_captured_whole() -> None:
    """One graph, the router of every layer seen through its selection bias, all experts behind it."""
    model = dsmoe.load_digits().requires_grad_(False)
    inputs = digits.initial_noise(0, 2), torch.full((2,), 700.0), digits.labels_of(2)
    report = moeca.explain(model, *inputs, schedule="full", inner="eager")
    assert report.graphs == 1
    assert not report.rejected
    assert [region.kind for region in report.regions] == ["attention", "experts"] * 6
    for region in report.regions[1::2]:
        (info,) = region.experts
        assert info.router is not None
        assert (info.router.choice, info.router.num_experts, info.router.top_k) == ("token", 16, 4)


# -- the committed checkpoint -----------------------------------------------------------------------------------------


def test_checkpoint_is_small() -> None:
    assert dsmoe.MODEL_FILE.stat().st_size <= 8e6
    assert {value.dtype for value in load_file(dsmoe.MODEL_FILE).values()} == {torch.float16}


def test_every_expert_is_used() -> None:
    model, seen = dsmoe.load_digits(), []
    for block in model.blocks:
        block.moe.gate.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    digits.sample(model, seed=3, n=10, steps=5)
    for layer in range(6):
        share = torch.cat(seen[layer::6]).flatten().bincount(minlength=16) / (5 * 20 * 64 * 4)
        assert share.min() > 0.01


@pytest.mark.parametrize(("n", "steps"), [(10, 20), pytest.param(100, 50, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_samples_show_their_class(n: int, steps: int) -> None:
    images = digits.sample(dsmoe.load_digits(), seed=1, n=n, steps=steps)
    assert images.shape == (n, 1, 16, 16)
    assert digits.accuracy(images, digits.labels_of(n)) >= 0.9
