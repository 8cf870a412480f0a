"""The committed digits model makes digits, and the sampler around it does what it says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples import digits


@pytest.fixture(scope="module")
def model() -> digits.DiTMoE:
    return digits.load_model()


def test_checkpoints_are_small() -> None:
    assert digits.MODEL_FILE.stat().st_size + digits.CLASSIFIER_FILE.stat().st_size <= 8e6
    assert {value.dtype for value in load_file(digits.MODEL_FILE).values()} == {torch.float16}


def test_model_is_ready_to_sample(model: digits.DiTMoE) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_expert_is_used(model: digits.DiTMoE) -> None:
    """A collapsed router would make the example useless for whatever concerns experts."""
    seen: list[Tensor] = []
    hooks = [block.moe.gate.register_forward_hook(lambda *call: seen.append(call[-1][0])) for block in model.blocks]
    digits.sample(model, seed=3, n=10, steps=5)
    for hook in hooks:
        hook.remove()
    for layer in range(len(model.blocks)):
        share = torch.cat(seen[layer :: len(model.blocks)]).flatten().bincount(minlength=8) / (5 * 20 * 64 * 2)
        assert share.min() > 0.02


@pytest.mark.parametrize(("n", "steps"), [(10, 20), pytest.param(100, 50, marks=pytest.mark.slow)])
def test_samples_show_their_class(model: digits.DiTMoE, n: int, steps: int) -> None:
    images = digits.sample(model, seed=1, n=n, steps=steps)
    assert images.shape == (n, 1, 16, 16)
    assert digits.accuracy(images, digits.labels_of(n)) >= 0.9


def test_both_layouts_agree(model: digits.DiTMoE) -> None:
    batched, apart = (digits.sample(model, seed=2, n=4, steps=10, layout=layout) for layout in ("batched", "two_calls"))
    torch.testing.assert_close(batched, apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["batched", "two_calls"])
def test_sampler_is_guided_euler(layout: str) -> None:
    """Constant velocities, 3 with a label and 1 without: x goes from the noise by -(1 + cfg * 2)."""
    times, steps = [], []

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert t.shape == labels.shape == x.shape[:1]
        times.append(t[0].item())
        return torch.where(labels == digits.CLASSES, 1.0, 3.0).view(-1, 1, 1, 1).expand_as(x)

    made = digits.sample(velocity, 5, n=12, steps=4, cfg=1.5, layout=layout, callback=lambda i, x: steps.append(i))
    torch.testing.assert_close(made, digits.initial_noise(5, 12) - 4)
    calls = 1 if layout == "batched" else 2
    assert times == [t for t in (1000.0, 750.0, 500.0, 250.0) for _ in range(calls)]
    assert steps == [0, 1, 2, 3]


def test_unknown_layout_is_refused(model: digits.DiTMoE) -> None:
    with pytest.raises(ValueError, match="layout must be"):
        digits.sample(model, seed=0, layout="both")


def test_noise_depends_on_its_seed_only() -> None:
    assert torch.equal(digits.initial_noise(1, 4), digits.initial_noise(1, 4))
    assert not torch.equal(digits.initial_noise(1, 4), digits.initial_noise(2, 4))


def test_psnr() -> None:
    a = torch.zeros(2, 1, 16, 16)
    b = a.clone()
    b[1] += 0.2
    assert digits.psnr(a, b)[0] == float("inf")
    assert digits.psnr(a, b)[1].item() == pytest.approx(20, abs=1e-4)


def test_fast_training_dispatch_agrees(model: digits.DiTMoE) -> None:
    pytest.importorskip("rich")
    from examples.train_digits import sorted_branches

    moe = model.blocks[2].moe
    x, ids = torch.randn(40, 96), torch.randint(0, 6, (80,))  # two experts get nothing
    torch.testing.assert_close(sorted_branches(moe, x, ids), moe.moe_train(x, ids), rtol=1e-4, atol=1e-5)
