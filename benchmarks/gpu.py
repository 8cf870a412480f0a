"""DiT-MoE-XL/2 and G/2 on a GPU: uncached torch.compile against moeca at intervals 2 to 5, bfloat16, 50 steps.

    python -m benchmarks.gpu                      # both models, 256 and 512 px, batch 1 and 8, each with guidance
    python -m benchmarks.gpu --model XL/2-8E2A --pixels 256 --images 1     # some of it
    python -m benchmarks.gpu --quick              # a small model, few steps, also without a GPU: does it run?

Weights are random: speed only. Guidance is one call of two samples an image. Trajectories take turns, one a contender
and round, each timed as a whole with the GPU idle before and after; medians and ratios as `benchmarks.protocol` has
them. Results: results/gpu.json, a run at a time, so that an interrupted benchmark keeps what it has.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from benchmarks.protocol import Timing, arguments, as_json, folder_of, interleave, print_table, save
from examples.dit_moe import dit_moe, randomize_

MODELS, PIXELS, IMAGES = ("XL/2-8E2A", "G/2-16E2A"), (256, 512), (1, 8)
INTERVALS = (2, 3, 4, 5)
BASELINE = "torch.compile, prepared"
GRAPHS = ", CUDA graphs"


@dataclass(frozen=True)
class Work:
    """One model at one size: what a trajectory does."""

    model: str
    pixels: int
    images: int
    device: str
    steps: int = 50
    depth: int | None = None  # of the published model

    @property
    def name(self) -> str:
        return f"{self.model}, {self.pixels} px, batch {self.images} with guidance"

    def network(self) -> nn.Module:
        """Prepared, bfloat16, in place on the device."""
        torch.manual_seed(0)
        changed = {} if self.depth is None else {"depth": self.depth}
        network = randomize_(dit_moe(self.model, input_size=self.pixels // 8, **changed))
        network = network.to(self.device, torch.bfloat16).eval().requires_grad_(False)
        moeca.prepare(network)
        return network

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (2n,4,s,s), timesteps (2n,), labels (2n,)."""
        side, generator = self.pixels // 8, torch.Generator().manual_seed(0)
        x = torch.randn(self.images, 4, side, side, generator=generator).repeat(2, 1, 1, 1)
        labels = torch.tensor([207, 1000]).repeat_interleave(self.images)
        return (
            x.to(self.device, torch.bfloat16),
            torch.full((len(x),), 1000.0, device=self.device),
            labels.to(self.device),
        )


@torch.no_grad()
def sample(model: Any, work: Work) -> Tensor:
    """Euler's method along the guided velocity."""
    x, first, labels = work.inputs()
    for step in range(work.steps):
        cond, uncond = model(x, first * (1 - step / work.steps), labels)[:, :4].chunk(2)
        velocity = uncond + 1.5 * (cond - uncond)
        x = x - torch.cat([velocity, velocity]) / work.steps
    if work.device == "cuda":
        torch.cuda.synchronize()
    return x


def contenders(network: nn.Module, intervals: Sequence[int], graphs: bool) -> Mapping[str, Any]:
    """The baseline, moeca with nothing reused, and each interval; as they are and, with `graphs`, as CUDA graphs."""
    schedules = {"everything computed": "full", **{f"interval {k}": f"uniform:{k}" for k in intervals}}
    found: dict[str, Any] = {BASELINE: torch.compile(network, dynamic=False)}
    if graphs:
        found[BASELINE + GRAPHS] = torch.compile(network, dynamic=False, mode="reduce-overhead")
    for name, schedule in schedules.items():
        found[name] = moeca.compile(network, schedule=schedule)
        if graphs:
            found[name + GRAPHS] = moeca.compile(network, schedule=schedule, cuda_graphs=True)
    return found


def measure(work: Work, intervals: Sequence[int], rounds: int) -> dict[str, Any]:
    """Times of whole trajectories, share of the MACs, bytes of state and peak memory of each contender."""
    torch._dynamo.reset()
    graphs = work.device == "cuda"
    models = contenders(work.network(), intervals, graphs)
    runs: dict[str, Callable[[], object]] = {name: partial(sample, model, work) for name, model in models.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():  # compiles; then what one trajectory needs
        run()
        if graphs:
            torch.cuda.reset_peak_memory_stats()
            run()
        figures[name] = {"peak_bytes": torch.cuda.max_memory_allocated() if graphs else None}
        if not name.startswith(BASELINE):
            stats = moeca.stats(models[name])
            figures[name] |= {"mac_fraction": round(stats.mac_fraction, 5), "state_bytes": stats.state_bytes}
    timings: dict[str, Timing] = interleave(runs, rounds=rounds, warmup=1)
    print_table(work.name, timings, BASELINE)
    times = as_json(timings, BASELINE)
    return {name: times[name] | figures[name] for name in times}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure large DiT-MoE models on a GPU.", "a small model, few steps")
    parser.add_argument("--model", nargs="*", default=MODELS, help="published configurations")
    parser.add_argument("--pixels", nargs="*", type=int, default=PIXELS)
    parser.add_argument("--images", nargs="*", type=int, default=IMAGES)
    args = parser.parse_args(argv)
    out = folder_of(args)
    if args.quick:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        works, intervals, rounds = [Work("S/2-8E2A", 64, 1, device, steps=4, depth=2)], (3,), 1
    else:
        if not torch.cuda.is_available():
            parser.error("no GPU is here: torch.cuda.is_available() is False; --quick runs without one")
        works = [Work(*one, "cuda") for one in product(args.model, args.pixels, args.images)]
        intervals, rounds = INTERVALS, 5
    file = None if out is None else out / "gpu.json"
    found = json.loads(file.read_text())["runs"] if file is not None and file.exists() else {}
    for work in works:
        found[work.name] = measure(work, intervals, rounds)
        if out is not None:
            save("gpu", {"runs": found}, out)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
