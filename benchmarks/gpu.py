"""DiT-MoE-XL/2 and G/2 on a GPU: uncached torch.compile against moeca at intervals 2 to 5, bfloat16, 50 steps.

    python -m benchmarks.gpu                      # both models, 256 and 512 px, batch 1 and 8, each with guidance
    python -m benchmarks.gpu --model XL/2-8E2A --pixels 256 --images 1     # some of it
    python -m benchmarks.gpu --model G/2-16E2A --side-by-side     # compile all at once, then time each by itself
    python -m benchmarks.gpu --report             # docs/gpu.md from the results
    python -m benchmarks.gpu --quick              # a small model, few steps, also without a GPU: does it run?

Weights are random: speed only. Guidance is one call of two samples an image. Experts' weights lie side by side
(`pack_experts`) and guards are left out once all is compiled (`skip_guard_eval_unsafe`), for torch.compile as for
moeca; its steps and timesteps are told by `moeca.trajectory`: nobody waits for the GPU before a trajectory ends.
Trajectories take turns, one a contender and round, each timed as a whole with the GPU idle before and after; medians
and ratios as `benchmarks.protocol` has them. Results: results/gpu.json, a run at a time, so that an interrupted
benchmark keeps what it has.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from benchmarks.gpu_report import BASELINE, GRAPHS, STEPS, page
from benchmarks.models import timesteps
from benchmarks.protocol import RESULTS, Timing, arguments, as_json, folder_of, interleave, machine, print_table, save
from benchmarks.turns import Job, in_turns
from examples.dit_moe import CONFIGS, dit_moe, randomize_
from moeca_compile.frontend.handles import states_of
from moeca_compile.schedule import Schedule

MODELS, PIXELS, IMAGES = ("XL/2-8E2A", "G/2-16E2A"), (256, 512), (1, 8)
INTERVALS = (2, 3, 4, 5)
PAGE = Path("docs/gpu.md")


@dataclass(frozen=True)
class Work:
    """One model at one size: what a trajectory does."""

    model: str
    pixels: int
    images: int
    device: str
    steps: int = STEPS
    depth: int | None = None  # of the published model

    @property
    def name(self) -> str:
        return f"{self.model}, {self.pixels} px, batch {self.images} with guidance"

    @property
    def rounds(self) -> int:
        """Fewer of what takes long."""
        return 5 if self.images == 1 else 3

    def network(self) -> nn.Module:
        """Prepared, bfloat16, made on the device."""
        changed = {} if self.depth is None else {"depth": self.depth}
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                network = randomize_(dit_moe(self.model, input_size=self.pixels // 8, **changed))
        finally:
            torch.set_default_dtype(torch.float32)
        network = network.bfloat16().eval().requires_grad_(False)
        moeca.prepare(network)
        return network

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Latents (2n,4,s,s), labels (2n,)."""
        side, generator = self.pixels // 8, torch.Generator().manual_seed(0)
        x = torch.randn(self.images, 4, side, side, generator=generator).repeat(2, 1, 1, 1)
        labels = torch.tensor([207, 1000]).repeat_interleave(self.images)
        return x.to(self.device), labels.to(self.device)


@dataclass(frozen=True)
class Contender:
    """A compiled model and, if it is moeca's, the schedule it runs: one model serves all of them."""

    model: Any
    schedule: str | None = None

    def begin(self) -> None:
        """Bind the schedule. Variants stay compiled; a layout of the state has its own."""
        for state in states_of(self.model) if self.schedule else ():
            for program in state.runtime.programs.values():
                program.compiled_schedule = program.compiled(Schedule.parse(self.schedule or ""))

    @torch.no_grad()
    def sample(self, work: Work) -> Tensor:
        """Euler's method along the guided velocity."""
        (x, labels), times = work.inputs(), timesteps(work.steps)
        moved = nullcontext()
        if self.schedule:
            moved = moeca.trajectory(self.model, work.steps, "guided", timesteps=times, frozen=True)
        with moved:
            for timestep in times:
                output = self.model(x.bfloat16(), torch.full((len(x),), timestep, device=work.device), labels)
                cond, uncond = output[:, :4].float().chunk(2)
                velocity = uncond + 1.5 * (cond - uncond)
                x = x - torch.cat([velocity, velocity]) / work.steps
        if work.device == "cuda":
            torch.cuda.synchronize()
        return x


def contenders(network: nn.Module, intervals: Sequence[int], plain: bool, graphs: bool) -> Mapping[str, Contender]:
    """The baseline, moeca with nothing reused, and each interval; as they are with `plain`, as CUDA graphs with
    `graphs`."""
    schedules = {"everything computed": "full", **{f"interval {k}": f"uniform:{k}" for k in intervals}}
    found: dict[str, Contender] = {}
    for ending, wanted in (("", plain), (GRAPHS, graphs)):
        if wanted:
            cached = moeca.compile(network, schedule="full", pack_experts=True, cuda_graphs=bool(ending))
            found |= {name + ending: Contender(cached, schedule) for name, schedule in schedules.items()}
    if plain:
        found[BASELINE] = Contender(torch.compile(network, dynamic=False))
    if graphs:
        found[BASELINE + GRAPHS] = Contender(torch.compile(network, dynamic=False, mode="reduce-overhead"))
    return found


def job(work: Work, intervals: Sequence[int], rounds: int, plain: bool) -> Iterator[Any]:
    """Compile all contenders; then time them: the run as results/gpu.json keeps it. Yields after each."""
    torch._dynamo.reset()
    models = contenders(work.network(), intervals, plain, work.device == "cuda")
    figures = compiled(work, models)
    yield None
    times = timed(work, models, rounds)
    yield {"machine": machine(), "contenders": {name: times[name] | figures[name] for name in times}}


def compiled(work: Work, models: Mapping[str, Contender]) -> dict[str, dict[str, Any]]:
    """Seconds of the first trajectory, peak memory of the second, share of the MACs and bytes of state of each."""
    figures: dict[str, dict[str, Any]] = {}
    truth: Tensor | None = None
    for name, one in models.items():
        started = time.perf_counter()
        result = _run(one, work)
        figures[name] = {"first_seconds": round(time.perf_counter() - started, 1)}
        if work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        again = _run(one, work)
        if work.device == "cuda":
            figures[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
        truth = result if truth is None else truth
        figures[name]["error_of_way"] = round(float((again - truth).norm() / (truth - work.inputs()[0]).norm()), 4)
        if one.schedule:
            stats = moeca.stats(one.model)
            figures[name] |= {"mac_fraction": round(stats.mac_fraction, 5), "state_bytes": stats.state_bytes}
        print(f"{work.name}: {name}: {figures[name]}", flush=True)
    return figures


def timed(work: Work, models: Mapping[str, Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of whole trajectories."""
    runs: dict[str, Callable[[], object]] = {name: partial(one.sample, work) for name, one in models.items()}
    before: dict[str, Callable[[], object]] = {name: one.begin for name, one in models.items()}
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        timings: dict[str, Timing] = interleave(runs, rounds=rounds, warmup=1, before=before)
    baseline = BASELINE if BASELINE in models else BASELINE + GRAPHS
    print_table(work.name, timings, baseline)
    return as_json(timings, baseline)


def experts_alone(model: str, tokens: Sequence[int], repeats: int = 20) -> dict[str, float]:
    """Milliseconds of one layer's `moeca::experts`, its weights stacked at each call and lying side by side."""
    config, found = CONFIGS[model], dict[str, float]()
    width, hidden = config.hidden_size, 4 * config.hidden_size
    together = [
        torch.randn(config.num_experts, *shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
        for shape in ((hidden, width), (width, hidden), (hidden, width))
    ]
    weights = {
        "side by side": [list(one) for one in together],
        "stacked": [[w.clone() for w in one] for one in together],
    }
    for count in tokens:
        x = torch.randn(count, width, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(count, config.num_experts, device="cuda").topk(config.experts_per_token).indices
        for name, (up, down, gate) in weights.items():
            spent = []
            for _ in range(repeats):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(2_000_000)  # so that launching isn't what is timed
                begin.record()
                torch.ops.moeca.experts(x, ids, up, down, gate, [], [], [], "silu")
                end.record()
                torch.cuda.synchronize()
                spent.append(begin.elapsed_time(end))
            found[f"{count} tokens, {name}"] = round(statistics.median(spent), 4)
    print(f"experts of {model} alone, ms: {found}", flush=True)
    return found


def _run(one: Contender, work: Work) -> Tensor:
    one.begin()
    return one.sample(work)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure large DiT-MoE models on a GPU.", "a small model, few steps")
    parser.add_argument("--model", nargs="*", default=MODELS, help="published configurations")
    parser.add_argument("--pixels", nargs="*", type=int, default=PIXELS)
    parser.add_argument("--images", nargs="*", type=int, default=IMAGES)
    parser.add_argument("--graphs-only", action="store_true", help="leave out what runs without CUDA graphs")
    parser.add_argument("--side-by-side", action="store_true", help="compile all sizes at once, each in a process")
    parser.add_argument("--report", action="store_true", help="write the page from the results, measure nothing")
    args = parser.parse_args(argv)
    out = folder_of(args)
    if args.report:
        PAGE.write_text(page(json.loads(((out or RESULTS) / "gpu.json").read_text())))
        return
    if args.quick:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        works, intervals = [Work("S/2-8E2A", 64, 1, device, steps=4, depth=2)], (3,)
    else:
        if not torch.cuda.is_available():
            parser.error("no GPU is here: torch.cuda.is_available() is False; --quick runs without one")
        works, intervals = [Work(*one, "cuda") for one in product(args.model, args.pixels, args.images)], INTERVALS
    file = None if out is None else out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    payload = {
        "remarks": found.get("remarks", []),
        "experts_ms": found.get("experts_ms", {}),
        "runs": found.get("runs", {}),
    }
    for model in () if args.quick else args.model:
        payload["experts_ms"][model] = experts_alone(model, (512, 4096, 16384))
    torch.cuda.empty_cache()
    jobs = {
        work.name: partial(job, work, intervals, 1 if args.quick else work.rounds, not args.graphs_only)
        for work in works
    }
    if args.side_by_side:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(jobs)))
    for name, run in in_turns(jobs) if args.side_by_side else _one_by_one(jobs):
        payload["runs"][name] = run
        if out is not None:
            save("gpu", payload, out)


def _one_by_one(jobs: Mapping[str, Job]) -> Iterator[tuple[str, Any]]:
    """As `in_turns`, in this process."""
    for name, one in jobs.items():
        *_, run = one()
        yield name, run
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
