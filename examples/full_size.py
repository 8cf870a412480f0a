"""Models at their published sizes, without weights: what the package would find and free in them.

    moeca explain examples.full_size:flux
    python -m examples.full_size flux hidream wan qwen_image dit_moe_g

Each function returns (model, inputs) on torch's meta device, where tensors have shapes and no data: no gigabyte is
allocated and nothing is computed. The sizes are those of the released configurations, in bfloat16, one sample a call.
The second command prints rows of the table in docs/full-size.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.inspect.report import Report

Example = tuple[nn.Module, dict[str, Any]]
SCHEDULE = "uniform:3"
GRANULARITIES = ("region", "stack")
MACS_A_BYTE = 150  # of a GPU such as the H100: 495 T bfloat16 multiply-accumulates and 3.35 TB a second
COLUMNS = (
    "model", "parameters", "regions", "MACs a call", "state: region", "state: stack", "only prologues read",
    "MACs of v1", "estimated time of v1", "seconds",
)  # fmt: skip


def flux(**sizes: Any) -> Example:
    """FLUX.1-dev (11.9 B parameters), 1024x1024 pixels: 4096 image tokens and 512 of text."""
    from diffusers import FluxTransformer2DModel

    released = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
    inputs = {
        "hidden_states": _empty(1, 4096, 64),
        "encoder_hidden_states": _empty(1, 512, 4096),
        "pooled_projections": _empty(1, 768),
        "timestep": _empty(1),
        "img_ids": _empty(4096, 3),
        "txt_ids": _empty(512, 3),
        "guidance": _empty(1, dtype=torch.float32),
    }
    return _model(FluxTransformer2DModel, **released | sizes), inputs


def hidream(**sizes: Any) -> Example:
    """HiDream-I1-Full (17 B), 4 experts of which a token takes 2, 1024x1024 pixels: 4096 image tokens."""
    from diffusers import HiDreamImageTransformer2DModel

    released: dict[str, Any] = {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32,
        "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
        "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
    }  # fmt: skip
    released |= sizes
    layers = released["num_layers"] + released["num_single_layers"]
    released.setdefault("llama_layers", [min(layer, 31) for layer in range(layers)])
    inputs = {
        "hidden_states": _empty(1, 16, 128, 128),
        "timesteps": _empty(1),
        "encoder_hidden_states_t5": _empty(1, 128, 4096),
        "encoder_hidden_states_llama3": _empty(32, 1, 128, 4096),
        "pooled_embeds": _empty(1, 2048),
    }
    return _model(HiDreamImageTransformer2DModel, **released), inputs


def wan(**sizes: Any) -> Example:
    """One of the two transformers of Wan2.2-T2V-A14B (14 B each), 81 frames of 832x480 pixels: 32,760 tokens."""
    from diffusers import WanTransformer3DModel

    released = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
    inputs = {
        "hidden_states": _empty(1, 16, 21, 60, 104),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, 512, 4096),
    }
    return _model(WanTransformer3DModel, **released | sizes), inputs


def qwen_image(**sizes: Any) -> Example:
    """Qwen-Image (20 B), 1024x1024 pixels: 4096 image tokens and 256 of text."""
    from diffusers import QwenImageTransformer2DModel

    released = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
    inputs = {
        "hidden_states": _empty(1, 4096, 64),
        "encoder_hidden_states": _empty(1, 256, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 256, dtype=torch.bool, device="meta"),
        "timestep": _empty(1),
        "img_shapes": [[(1, 64, 64)]],
    }
    return _model(QwenImageTransformer2DModel, **released | sizes), inputs


def dit_moe_g(**sizes: Any) -> Example:
    """DiT-MoE-G/2 (16.5 B), 16 experts of which a token takes 2, 512x512 pixels: 1024 tokens, with both halves of
    guidance in a call."""
    from examples.dit_moe import CONFIGS, DiTMoE, replace

    config = replace(CONFIGS["G/2-16E2A"], **{"input_size": 64} | sizes)
    inputs = {
        "x": _empty(2, config.in_channels, config.input_size, config.input_size),
        "t": _empty(2),
        "y": torch.empty(2, dtype=torch.int64, device="meta"),
    }
    return _model(lambda: DiTMoE(config)), inputs


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _model(build: Callable[..., nn.Module], **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return build(**sizes).to(torch.bfloat16).eval().requires_grad_(False)


def row(name: str, **sizes: Any) -> list[str]:
    """One row of the table, as `COLUMNS` names them."""
    model, inputs = globals()[name](**sizes)
    start = time.process_time()
    reports = [_explain(model, inputs, granularity) for granularity in GRANULARITIES]
    seconds = (time.process_time() - start) / len(reports)
    report, weights = reports[0], sum(p.numel() * p.element_size() for p in model.parameters())
    full, cheap = report.variants
    return [
        name,
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f} B",
        str(len(report.regions)),
        f"{report.total_macs / 1e12:.1f} T",
        *(f"{each.state_bytes / 1e9:.2f} GB" for each in reports),
        f"{report.hoisted_weight_bytes / 1e9:.2f} GB, {report.hoisted_weight_bytes / weights:.0%} of the weights",
        f"{cheap.macs / full.macs:.1%}",
        f"{_ticks(report, 1) / _ticks(report, 0):.1%}",
        f"{seconds:.0f}",
    ]


def _explain(model: nn.Module, inputs: dict[str, Any], granularity: str) -> Report:
    torch._dynamo.reset()
    return moeca.explain(model, keywords=inputs, schedule=SCHEDULE, granularity=granularity, inner="eager")


def _ticks(report: Report, number: int) -> float:
    """An estimate of a variant's time, in MACs: it multiplies, or it waits for weights and state, whichever is longer.

    The roofline of Williams et al. (2009), for the variant as a whole: what is not a multiplication counts as fused.
    """
    variant = report.variants[number]
    state = report.state_bytes if variant.reads or variant.writes else 0
    return max(variant.macs, MACS_A_BYTE * (variant.weight_bytes + state))


def main(names: Sequence[str]) -> None:
    """Print the table's rows for these models as Markdown."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in names:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
