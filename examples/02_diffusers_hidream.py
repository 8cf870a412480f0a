"""The real HiDreamImagePipeline of diffusers, cached by replacing its transformer by a compiled one.

    python -m examples.02_diffusers_hidream                      # a table, in well under a minute
    python -m examples.02_diffusers_hidream --inner inductor     # everything compiled; minutes of compiling
    python -m examples.02_diffusers_hidream --json               # the figures as one line of JSON

The pipeline class, its scheduler, its guidance and its model code are diffusers' own, unchanged; the components are
tiny and random, so that nothing is downloaded. So the images mean nothing, and the seconds say nothing of the real
model: 17 B parameters, 4096 image tokens. What carries over is that it runs, as one graph, and what share of the
multiply-accumulates a schedule leaves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import moeca_compile as moeca

SCHEDULE, ORDER = "uniform:3", 1
T5, LLAMA, POOLED, TOKENS = 32, 24, 16, 8  # widths of the text features, and how many tokens
LLAMA_LAYERS = 4  # whose features are given


@dataclass(frozen=True)
class Figures:
    """One way of running the pipeline; seconds are the median over `runs` images, without the first call.

    `psnr_db` None: the images are the same, bit by bit.
    """

    name: str
    seconds: float
    first_call_seconds: float
    graphs: int
    mac_fraction: float
    psnr_db: float | None
    state_bytes: int


def random_weights(module: nn.Module, seed: int) -> nn.Module:
    """The same for each seed; what starts at zero is filled too: gates at zero would switch every block off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
            elif not (parameter == 1).all():  # all but the scales of norms
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def tiny_transformer(size: int = 16, layers: int = 2, heads: int = 4, head: int = 16) -> nn.Module:
    """HiDream's transformer with random weights: `layers` double and as many single blocks, `heads` heads of `head`."""
    import diffusers

    return random_weights(
        diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=layers, num_single_layers=layers, attention_head_dim=head,
            num_attention_heads=heads, caption_channels=[T5, LLAMA], text_emb_dim=POOLED, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(head // 2, head // 4, head // 4), max_resolution=(size, size),
            llama_layers=[layer % LLAMA_LAYERS for layer in range(2 * layers)],
        ),
        seed=2,
    )  # fmt: skip


def tiny_pipeline(size: int = 16) -> Any:
    """diffusers' pipeline around tiny components; images of `2 * size` pixels, `size**2 / 4` image tokens."""
    import diffusers

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=2 * size,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    text = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4"))
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random_weights(vae, 1),
        transformer=tiny_transformer(size),
        **text,
    )
    pipeline.default_sample_size = size
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(seed: int) -> dict[str, Tensor]:
    """What the text encoders would give for a prompt and for the empty one."""
    generator = torch.Generator().manual_seed(seed)

    def features(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        f"{sign}{name}": features(*shape)
        for sign in ("", "negative_")
        for name, shape in (
            ("prompt_embeds_t5", (1, TOKENS, T5)),
            ("prompt_embeds_llama3", (LLAMA_LAYERS, 1, TOKENS, LLAMA)),
            ("pooled_prompt_embeds", (1, POOLED)),
        )
    }


def draw(pipeline: Any, seed: int, steps: int) -> Tensor:
    """One guided image, (1, 3, H, W) in [0, 1]; the pipeline's own loop, both guidance branches in one call."""
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(
        **prompt(seed), num_inference_steps=steps, guidance_scale=5.0, generator=generator, output_type="pt"
    )
    return drawn.images.float()


def psnr(images: Sequence[Tensor], truth: Sequence[Tensor]) -> float | None:
    error = torch.cat([(a - b).square().flatten() for a, b in zip(images, truth, strict=True)]).mean()
    return None if error == 0 else float(-10 * error.log10())


def contenders(inner: str) -> dict[str, Any]:
    """The same pipeline three times: as it is, computed in full by moeca, and cached."""
    plain, full, cached = (tiny_pipeline() for _ in range(3))
    if inner == "inductor":
        plain.transformer = torch.compile(plain.transformer)
    full.transformer = torch.compile(full.transformer, backend="moeca", options={"schedule": "full", "inner": inner})
    cached.transformer = torch.compile(
        cached.transformer, backend="moeca", options={"schedule": SCHEDULE, "order": ORDER, "inner": inner}
    )
    return {
        "torch.compile" if inner == "inductor" else "eager": plain,
        "moeca, computed in full": full,
        f"moeca, {SCHEDULE}, order {ORDER}": cached,
    }


def compare(runs: int, steps: int, inner: str) -> list[Figures]:
    """The same images with each; runs take turns."""
    pipelines = contenders(inner)
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    images: dict[str, list[Tensor]] = {name: [] for name in pipelines}
    for name, pipeline in pipelines.items():
        start = time.perf_counter()
        draw(pipeline, 0, steps)
        first[name] = time.perf_counter() - start
    for seed in range(runs):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            images[name].append(draw(pipeline, seed, steps))
            seconds[name].append(time.perf_counter() - start)
    truth = next(iter(images.values()))
    figures = []
    baseline = next(iter(pipelines))  # the pipeline without moeca
    for name, pipeline in pipelines.items():
        stats = None if name == baseline else moeca.stats(pipeline.transformer)
        figures.append(
            Figures(
                name=name,
                seconds=statistics.median(seconds[name]),
                first_call_seconds=first[name],
                graphs=stats.graphs if stats else 0,
                mac_fraction=stats.mac_fraction if stats else 1.0,
                psnr_db=psnr(images[name], truth),
                state_bytes=stats.state_bytes if stats else 0,
            )
        )
    return figures


def print_table(figures: Sequence[Figures], steps: int, console: Console) -> None:
    title = f"HiDreamImagePipeline, tiny and random, {steps} steps, guidance 5"
    table = Table("", *(one.name for one in figures), title=title, title_justify="left")
    quality = ["the same" if one.psnr_db is None else f"{one.psnr_db:.1f} dB" for one in figures]
    table.add_row("seconds an image", *(f"{one.seconds:.2f}" for one in figures))
    table.add_row("share of the MACs", *(f"{one.mac_fraction:.1%}" for one in figures))
    table.add_row(f"PSNR against {figures[0].name}", "", *quality[1:])
    table.add_row("graphs", *(str(one.graphs) if one.graphs else "" for one in figures))
    table.add_row("cached state", *(f"{one.state_bytes / 1e6:.2f} MB" for one in figures))
    table.add_row("first image, seconds", *(f"{one.first_call_seconds:.1f}" for one in figures))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run diffusers' HiDream pipeline plain and with moeca.")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    parser.add_argument("--runs", type=int, default=3, help="images for each (default 3)")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps (default 16)")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager", help="what runs the graphs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures = compare(args.runs, args.steps, args.inner)
    if args.json:
        print(json.dumps([asdict(one) for one in figures]))
    else:
        print_table(figures, args.steps, Console())


if __name__ == "__main__":
    main()
