"""Many sizes of images, videos, prompts and batches through real transformers: one trace, one compile of a variant."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from tests.compiles import in_place_of_inductor, traces
from tests.real.tiny import Arguments, moving, normal, time, tiny
from tests.real.zoo import flux, wan

SIZES = [(8, 8, 2, 6), (12, 8, 2, 6), (8, 12, 3, 9), (6, 10, 2, 5)]  # height, width, batch, tokens of the prompt


def sd3() -> nn.Module:
    """Other than in the zoo: with a table of places that is larger than what is read of it."""
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


def wan_call(step: int, height: int, width: int, batch: int, tokens: int) -> Arguments:
    return {
        "hidden_states": moving(step, batch, 4, 2, height, width), "timestep": time(step, batch),
        "encoder_hidden_states": normal(batch, tokens, 16),
    }  # fmt: skip


def flux_call(step: int, height: int, width: int, batch: int, tokens: int) -> Arguments:
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return {
        "hidden_states": moving(step, batch, height * width, 4), "timestep": time(step, batch, 1e-3),
        "encoder_hidden_states": normal(batch, tokens, 24), "pooled_projections": normal(batch, 20),
        "img_ids": torch.stack([torch.zeros(height, width), rows, columns], -1).view(-1, 3),
        "txt_ids": torch.zeros(tokens, 3), "guidance": torch.full((batch,), 3.5),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("build", "call"), [(sd3, sd3_call), (wan, wan_call), (flux, flux_call)])
def test_one_compile_a_variant(
    build: Callable[[], nn.Module], call: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = in_place_of_inductor(monkeypatch)
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
