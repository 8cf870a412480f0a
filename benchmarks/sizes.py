"""Seconds that each further image size costs, and where they go: FLUX of diffusers with two blocks, eight sizes.

    python -m benchmarks.sizes           # some minutes
    python -m benchmarks.sizes --quick   # three sizes, no Inductor
    python -m benchmarks.sizes --speed   # what a shared program costs a step, against one for the size alone

For each size two calls are made: a computed step and a forecast one. *dynamo*: its traces; that of the second size has
symbolic sizes and serves all further ones; with `dynamic=True`, of which the first columns are, the first one's does.
*capture*: the graph of one size and its regions, and the calls.
*variants*: the graph of each kind of step, compiled. Beside it the same calls without `dynamic=True`, and of plain
torch.compile, with symbolic sizes (its default) and with a graph for each size. Inductor's caches are off. The
contenders take turns, size by size.

`--speed`: FLUX with 256 channels. *shared*: a program that was compiled at 64 tokens, with `dynamic=True`, runs 256.
*each*: a model that has met the same three sizes, but runs a program for 256 tokens; both have Dynamo's symbolic sizes.
*alone*: a model that has met 256 tokens only. They take turns step by step: ratios of processor times, with 95 %
intervals (bootstrap of rounds). It writes `results/sizes.json`.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import torch
from torch import nn

import moeca_compile as moeca
from benchmarks.protocol import collecting_between, save

SIZES = (8, 12, 16, 20, 24, 28, 32, 36)  # tokens along an edge
MET = (8, 12, 16)  # with --speed
SHARED, EACH, ALONE = "shared", "each", "alone"


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


def compare_speed(rounds: int = 40) -> dict[str, Any]:
    """Print what a program for all sizes costs a step, against a program for its size alone."""
    torch._dynamo.config.recompile_limit = 2 * len(SIZES)
    kinds = {SHARED: (True, MET), EACH: (False, MET), ALONE: (False, MET[-1:])}
    models = {}
    for name, (share, sizes) in kinds.items():
        dynamic = True if share else None
        models[name] = moeca.compile(flux(heads=16), schedule="uniform:2", share_sizes=share, dynamic=dynamic)
        for size in sizes:
            seconds_of(models[name], size)
    assert not moeca.stats(models[SHARED]).unshared
    times: dict[tuple[str, int], list[float]] = {}
    calls = [inputs(MET[-1], step) for step in range(8)]
    with torch.no_grad(), collecting_between():
        for number in range(-2, rounds):
            for model in models.values():
                moeca.reset(model)
            for step, call in enumerate(calls):
                for turn in range(len(models)):
                    name = [*models][(number + step // 2 + turn) % len(models)]
                    begin = time.process_time()
                    models[name](**call)
                    if number >= 0:
                        times.setdefault((name, step % 2), []).append(1e3 * (time.process_time() - begin))
            gc.collect()
    return {"rounds": rounds, "calls_a_round": 4, "steps": [_ratios(times, kind, rounds) for kind in range(2)]}


def _ratios(times: dict[tuple[str, int], list[float]], kind: int, rounds: int) -> dict[str, Any]:
    """Ratios of processor times to the program for this size alone, by the median and by the fastest quarter's end."""
    by_name = {name: torch.tensor(times[name, kind]).view(rounds, -1) for name in (SHARED, EACH, ALONE)}
    drawn = torch.randint(rounds, (1000, rounds), generator=torch.Generator().manual_seed(0))
    step: dict[str, Any] = {"step": ("computed", "forecast")[kind]}
    for label, share in (("median", 0.5), ("quartile", 0.25)):
        alone = by_name[ALONE]
        step[label] = {"alone_ms": float(alone.quantile(share))}
        for name in (SHARED, EACH):
            each = by_name[name][drawn].flatten(1).quantile(share, dim=1) / alone[drawn].flatten(1).quantile(
                share, dim=1
            )
            low, high = each.quantile(torch.tensor([0.025, 0.975])).tolist()
            ratio = float(by_name[name].quantile(share) / alone.quantile(share))
            step[label][name] = [ratio, low, high]
            print(
                f"{step['step']} step, {label}: {name} {ratio:.3f} ({low:.3f} to {high:.3f}) of {ALONE}, "
                f"{step[label]['alone_ms']:.2f} ms"
            )
    return step


def main(arguments: list[str]) -> None:
    """Print the table."""
    if "--speed" in arguments:
        torch.set_num_threads(1)
        save("sizes", compare_speed())
        return
    quick = "--quick" in arguments
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    inner = "eager" if quick else "inductor"
    cached, by_default = (
        moeca.compile(flux(), schedule="uniform:2", inner=inner, max_signatures=len(SIZES), dynamic=dynamic)
        for dynamic in (True, None)
    )
    backend = "aot_eager" if quick else "inductor"
    symbolic, fixed = torch.compile(flux(), backend=backend), torch.compile(flux(), backend=backend, dynamic=False)
    torch._dynamo.config.recompile_limit = 2 * len(SIZES)
    columns = ("tokens", "moeca", "dynamo", "capture", "variants", "by default", "torch.compile", "dynamic=False")
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
        others = [seconds_of(model, size) for model in (by_default, symbolic, fixed)]
        cells = [total, traced, total - traced - variants, variants, *others]
        print(str(size * size).rjust(15) + "".join(f"{value:15.1f}" for value in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
