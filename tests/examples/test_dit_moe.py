"""The example DiT-MoE is what its released checkpoints expect, and its two dispatches compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.dit_moe import CONFIGS, DiTMoE, dit_moe, randomize_

TINY = {"depth": 2, "hidden_size": 64, "num_heads": 4, "input_size": 8, "num_classes": 10}
BOTH_ATTENTIONS = pytest.mark.parametrize("name", ["S/2-8E2A", "XL/2-8E2A"])


def tiny(name: str = "S/2-8E2A", **overrides: object) -> DiTMoE:
    return randomize_(dit_moe(name, **{**TINY, **overrides}), seed=1).eval()


def inputs(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.linspace(10, 900, n), torch.arange(n)


def millions(modules: list[nn.Module]) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "total", "routed", "shared", "active"),
    [
        ("S/2-8E2A", 199.3, 169.9, 10.6, 71.9),
        ("S/2-16E2A", 369.2, 339.7, 10.6, 71.9),
        ("B/2-8E2A", 795.9, 679.5, 42.5, 286.3),
        ("XL/2-8E2A", 4168, 3567, 223, 1493),
        ("G/2-16E2A", 16504, 15225, 476, 3182),
    ],
)
def test_published_sizes(name: str, total: float, routed: float, shared: float, active: float) -> None:
    with torch.device("meta"):
        model = dit_moe(name)
    experts = millions([block.moe.experts for block in model.blocks])
    idle = experts * (1 - model.config.experts_per_token / model.config.num_experts)
    digits = 1 if total < 1000 else 0
    assert round(millions([model]), digits) == total
    assert round(experts, digits) == routed
    assert round(millions([block.moe.shared_experts for block in model.blocks]), digits) == shared
    assert round(millions([model]) - idle, digits) == active


def test_every_published_name_is_there() -> None:
    assert set(CONFIGS) == {f"{s}/{p}-{e}E2A" for s in ("S", "B", "L", "XL", "G") for p in (2, 4, 8) for e in (8, 16)}


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown DiT-MoE configuration 'S/3'.*S/2-8E2A"):
        dit_moe("S/3")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("B/4-16E2A", {"qkv.weight": (2304, 768), "qkv.bias": (2304,), "proj.weight": (768, 768), "proj.bias": (768,)}),
        (
            "XL/2-8E2A",
            {
                "Wqkv.weight": (3456, 1152),
                "Wqkv.bias": (3456,),
                "out_proj.weight": (1152, 1152),
                "out_proj.bias": (1152,),
            }
            | {f"{which}_norm.{kind}": (72,) for which in "qk" for kind in ("weight", "bias")},
        ),
    ],
)
def test_state_dict_is_that_of_the_released_checkpoints(name: str, attention: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        model = dit_moe(name, depth=1)
    d, e, p = model.config.hidden_size, model.config.num_experts, model.config.patch_size
    expected = {
        "pos_embed": (1, (32 // p) ** 2, d),
        "x_embedder.proj.weight": (d, 4, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (1001, d),
        "blocks.0.adaLN_modulation.1.weight": (6 * d, d),
        "blocks.0.adaLN_modulation.1.bias": (6 * d,),
        "final_layer.linear.weight": (8 * p * p, d),
        "final_layer.linear.bias": (8 * p * p,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
        "blocks.0.moe.gate.weight": (e, d),
    }
    expected |= {f"blocks.0.attn.{key}": shape for key, shape in attention.items()}
    for prefix, width in [(f"experts.{i}", 4 * d) for i in range(e)] + [("shared_experts", 2 * d)]:
        expected |= {f"blocks.0.moe.{prefix}.{side}_proj.weight": (width, d) for side in ("gate", "up")}
        expected |= {f"blocks.0.moe.{prefix}.down_proj.weight": (d, width)}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_only_the_position_embedding_is_frozen() -> None:
    assert [name for name, p in tiny().named_parameters() if not p.requires_grad] == ["pos_embed"]


@BOTH_ATTENTIONS
@torch.no_grad()
def test_training_and_inference_dispatch_agree(name: str) -> None:
    model = tiny(name)
    out = model(*inputs())
    assert out.shape == (3, 8, 8, 8)
    assert out.std() > 0.1
    torch.testing.assert_close(model.train()(*inputs()), out, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dispatch_skips_experts_without_tokens() -> None:
    moe = tiny().blocks[0].moe
    x = torch.randn(4, 64)
    ids, weights = torch.tensor([[5, 1], [1, 5], [5, 1], [1, 5]]), torch.rand(4, 2)
    out = moe.moe_infer(x, ids.reshape(-1), weights.reshape(-1, 1))
    by_hand = torch.zeros_like(x)
    for token, slot in ((token, slot) for token in range(4) for slot in range(2)):
        by_hand[token] += weights[token, slot] * moe.experts[ids[token, slot]](x[token])
    torch.testing.assert_close(out, by_hand, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pretraining_slices_change_nothing() -> None:
    sliced, plain = tiny(pretraining_tp=2), tiny(pretraining_tp=1)
    torch.testing.assert_close(sliced(*inputs()), plain(*inputs()), rtol=1e-4, atol=1e-5)


def test_training_reaches_every_parameter() -> None:
    model = tiny().train()
    model(*inputs(8)).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_balancing_loss_reaches_the_router_only() -> None:
    """With a loss that weighs the output at zero, what is left of the gradient is the balancing loss's own."""
    moe = tiny(depth=1, aux_loss_weight=0.5).blocks[0].moe.train()
    x = torch.randn(2, 16, 64)
    _, _, aux = moe.gate(x)
    (expected,) = torch.autograd.grad(aux, moe.gate.weight)
    (0 * moe(x).sum()).backward()
    assert expected.abs().max() > 0
    torch.testing.assert_close(moe.gate.weight.grad, expected)
    assert all(not p.grad.any() for p in moe.experts.parameters() if p.grad is not None)


@torch.no_grad()
def test_initialised_as_dit_randomized_on_request() -> None:
    model = dit_moe("S/2-8E2A", **TINY).eval()
    assert not model(*inputs()).any()
    pos_embed = model.pos_embed.clone()
    first = randomize_(model, seed=3)(*inputs())
    assert torch.equal(randomize_(model, seed=3)(*inputs()), first)
    assert not torch.equal(randomize_(model, seed=4)(*inputs()), first)
    assert torch.equal(model.pos_embed, pos_embed)


@torch.no_grad()
def test_integer_timesteps() -> None:
    model, (x, _, y) = tiny(), inputs()
    t = torch.tensor([999, 500, 0])
    assert torch.equal(model(x, t, y), model(x, t.float(), y))


@torch.no_grad()
def test_half_precision_keeps_its_dtype() -> None:
    model, (x, t, y) = tiny("XL/2-8E2A").bfloat16(), inputs()
    out = model(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
