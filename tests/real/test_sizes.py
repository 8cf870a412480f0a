"""Many sizes of images, videos, prompts and batches through real transformers: one trace, one compile of a variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from tests.real.tiny import Arguments, moving, normal, time, tiny

SIZES = [(8, 8, 2, 6), (12, 8, 2, 6), (8, 12, 3, 9), (6, 10, 2, 5)]  # height, width, batch, tokens of the prompt


def sd3() -> nn.Module:
    return tiny(
        diffusers.SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=20, out_channels=4, pos_embed_max_size=192,
    )  # fmt: skip


def sd3_call(step: int, height: int, width: int, batch: int, tokens: int) -> Arguments:
    return {
        "hidden_states": moving(step, batch, 4, height, width), "timestep": time(step, batch),
        "encoder_hidden_states": normal(batch, tokens, 24), "pooled_projections": normal(batch, 20),
    }  # fmt: skip


def wan() -> nn.Module:
    return tiny(
        diffusers.WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip


def wan_call(step: int, height: int, width: int, batch: int, tokens: int) -> Arguments:
    return {
        "hidden_states": moving(step, batch, 4, 2, height, width), "timestep": time(step, batch),
        "encoder_hidden_states": normal(batch, tokens, 16),
    }  # fmt: skip


def flux() -> nn.Module:
    return tiny(
        diffusers.FluxTransformer2DModel, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip


def flux_call(step: int, height: int, width: int, batch: int, tokens: int) -> Arguments:
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return {
        "hidden_states": moving(step, batch, height * width, 4), "timestep": time(step, batch, 1e-3),
        "encoder_hidden_states": normal(batch, tokens, 24), "pooled_projections": normal(batch, 20),
        "img_ids": torch.stack([torch.zeros(height, width), rows, columns], -1).view(-1, 3),
        "txt_ids": torch.zeros(tokens, 3), "guidance": torch.full((batch,), 3.5),
    }  # fmt: skip


def traces() -> int:
    return len(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))


@pytest.mark.slow
@pytest.mark.parametrize(("build", "call"), [(sd3, sd3_call), (wan, wan_call), (flux, flux_call)])
def test_one_compile_a_variant(
    build: Callable[[], nn.Module], call: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []

    def as_it_stands(options: Any, gm: Any, args: Any, mode: Any) -> Any:
        compiled.append(mode is not None)
        if mode is not None:
            with mode:
                gm(*args)  # torch's symbols go through every node
        return gm

    monkeypatch.setattr("moeca_compile.lowering.inductor.lower._compiled", as_it_stands)
    model, plain, before = moeca.compile(build(), schedule="uniform:2", dynamic=True), build(), traces()
    for size in SIZES:
        for step in range(2):
            (found,) = model(**call(step, *size), return_dict=False)
            if not step:
                (expected,) = plain(**call(step, *size), return_dict=False)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert compiled == [True, True]
    assert traces() == before + 1
    assert moeca.stats(model).unshared == {}
