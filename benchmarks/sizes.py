"""Seconds that each further image size costs, and where they go: FLUX of diffusers with two blocks, eight sizes.

    python -m benchmarks.sizes           # some minutes
    python -m benchmarks.sizes --quick   # three sizes, no Inductor
    python -m benchmarks.sizes --speed   # what a shared program costs a step, against one for the size alone

For each size two calls are made: a computed step and a forecast one. *dynamo*: its traces; that of the second size has
symbolic sizes and serves all further ones. *capture*: the graph of one size and its regions, and the calls.
*variants*: the graph of each kind of step, compiled. Beside it the same calls of plain torch.compile, with symbolic
sizes (its default) and with a graph for each size. Inductor's caches are off. The contenders take turns, size by size.

`--speed`: FLUX with 256 channels. A program that was compiled at 64 and 144 tokens runs 256 tokens, in turns with one
that was compiled for 256 alone: ratios of the medians of processor times, with 95 % intervals (bootstrap of rounds).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

import moeca_compile as moeca

SIZES = (8, 12, 16, 20, 24, 28, 32, 36)  # tokens along an edge


def flux(heads: int = 4) -> nn.Module:
    """Two blocks of FLUX, 16 channels a head, random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=heads,
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


def compare_speed(rounds: int = 60) -> None:
    """Print what a program for all sizes costs a step, against one for its size alone."""
    torch._dynamo.config.recompile_limit = 2 * len(SIZES)
    shared = moeca.compile(flux(heads=16), schedule="uniform:2")
    alone = moeca.compile(flux(heads=16), schedule="uniform:2", share_sizes=False)
    for size in (8, 12, 16):
        seconds_of(shared, size)
    seconds_of(alone, 16)
    assert not moeca.stats(shared).unshared
    times: dict[tuple[str, int], list[float]] = {}
    calls = [inputs(16, step) for step in range(8)]
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in (("shared", shared), ("alone", alone)):
                moeca.reset(model)
                for step, call in enumerate(calls):
                    begin = time.process_time()
                    model(**call)
                    times.setdefault((name, step % 2), []).append(time.process_time() - begin)
    for kind, step in enumerate(("computed", "forecast")):
        one, other = (torch.tensor(times[name, kind]).view(rounds, -1) for name in ("shared", "alone"))
        drawn = torch.randint(rounds, (1000, rounds), generator=torch.Generator().manual_seed(0))
        ratios = (one[drawn].flatten(1).median(1).values / other[drawn].flatten(1).median(1).values).sort().values
        print(
            f"{step} step: {one.median() / other.median():.3f} of the time of a program for this size alone "
            f"({ratios[25]:.3f} to {ratios[975]:.3f}; {other.median() * 1e3:.2f} ms, {rounds} rounds of 4 calls)"
        )


def main(arguments: list[str]) -> None:
    """Print the table."""
    if "--speed" in arguments:
        torch.set_num_threads(1)
        return compare_speed()
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
