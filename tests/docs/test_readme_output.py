"""What the README shows as output is what its pipeline prints: diffusers' own Flux, small and random."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from tests.docs.pages import ROOT, blocks_of

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)


def flux() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=32, scaling_factor=1.0,
        shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval().requires_grad_(False),
        transformer=transformer.eval().requires_grad_(False),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_pipeline_prints_what_the_readme_shows() -> None:
    torch._dynamo.reset()
    pipe = flux()
    moeca.compile(pipe, schedule="uniform:3", inner="eager")
    pipe(
        prompt_embeds=torch.randn(1, 8, 32), pooled_prompt_embeds=torch.randn(1, 16), height=64, width=64,
        num_inference_steps=28,
    )  # fmt: skip
    lines = str(moeca.stats(pipe)).split("\n")
    shown = next(block.text for block in blocks_of("README.md") if block.language == "text")
    assert lines[0] == shown.strip()
    full = next(block.text for block in blocks_of("docs/start/first-run.md") if block.language == "text")
    beginning = full.split("...\n")[0].rstrip("\n").split("\n")
    assert [without_times(line) for line in beginning] == [without_times(line) for line in lines[: len(beginning)]]


def without_times(line: str) -> str:
    """A line of `stats` without what differs from run to run, and without the width of its columns."""
    return " ".join(re.sub(r"\d+\.\d+ ms|\d+\.\d{2}\b(?! MiB)", "#", line).split())
