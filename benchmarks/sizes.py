"""Seconds that each further image size costs, and where they go: FLUX of diffusers with two blocks, eight sizes.

    python -m benchmarks.sizes           # some minutes
    python -m benchmarks.sizes --quick   # three sizes, no Inductor

For each size two calls are made: a computed step and a forecast one. *dynamo*: its traces; that of the second size has
symbolic sizes and serves all further ones. *capture*: the graph of one size and its regions, and the calls.
*variants*: the graph of each kind of step, compiled. Beside it the same calls of plain torch.compile, with symbolic
sizes (its default) and with a graph for each size. Inductor's caches are off. The contenders take turns, size by size.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

import moeca_compile as moeca

SIZES = (8, 12, 16, 20, 24, 28, 32, 36)  # tokens along an edge


def flux() -> nn.Module:
    """Two blocks of FLUX, 64 channels, random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def inputs(size: int, step: int) -> dict[str, Any]:
    """The arguments of call `step` of a trajectory at this size."""
    return {
        "hidden_states": torch.randn(1, size * size, 16, generator=torch.Generator().manual_seed(0)) * (1 - 0.1 * step),
        "encoder_hidden_states": torch.ones(1, 16, 32),
        "pooled_projections": torch.ones(1, 32),
        "timestep": torch.tensor([0.9 - 0.1 * step]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(size)), torch.arange(float(size))),
        "txt_ids": torch.zeros(16, 3),
        "return_dict": False,
    }


def seconds_of(model: nn.Module, size: int) -> float:
    """Seconds of two first calls at a size."""
    start = time.perf_counter()
    with torch.no_grad():
        for step in range(2):
            model(**inputs(size, step))
    return time.perf_counter() - start


def dynamo_seconds() -> float:
    """Seconds of all Dynamo traces so far, with what their backends did in them."""
    return sum(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", []))


def main(arguments: list[str]) -> None:
    """Print the table."""
    quick = "--quick" in arguments
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    inner = "eager" if quick else "inductor"
    cached = moeca.compile(flux(), schedule="uniform:2", inner=inner, max_signatures=len(SIZES))
    backend = "aot_eager" if quick else "inductor"
    symbolic, fixed = torch.compile(flux(), backend=backend), torch.compile(flux(), backend=backend, dynamic=False)
    torch._dynamo.config.recompile_limit = 2 * len(SIZES)
    columns = ("tokens", "moeca", "dynamo", "capture", "variants", "torch.compile", "dynamic=False")
    print("".join(name.rjust(15) for name in columns))
    before: dict[str, float] = {}
    for size in SIZES[: 3 if quick else len(SIZES)]:
        traced = dynamo_seconds()
        total = seconds_of(cached, size)
        traced = dynamo_seconds() - traced
        after = moeca.stats(cached).compile_seconds
        spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
        before = dict(after)
        variants = sum(seconds for name, seconds in spent.items() if name != "capture")
        others = [seconds_of(model, size) for model in (symbolic, fixed)]
        cells = [total, traced, total - traced - variants, variants, *others]
        print(str(size * size).rjust(15) + "".join(f"{value:15.1f}" for value in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
