"""What a step, a run and a compile cost: eager, torch.compile and moeca on DiT-MoE-S/2-8E2A.

    python -m benchmarks.steps            # everything, about 20 minutes on one core; writes results/steps.json
    python -m benchmarks.steps --quick    # two blocks, few rounds: does it run?

Every contender gets the same weights, inputs and thread; see benchmarks/README.md for the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

import moeca_compile as moeca
from benchmarks import compile_seconds, models
from benchmarks.protocol import (
    Timing,
    arguments,
    as_json,
    folder_of,
    interleave,
    pin_threads,
    print_table,
    save,
)
from moeca_compile.schedule import Action, Schedule

SHIPPED = "torch.compile, as shipped"
FULL = "moeca, full"
COMPUTED = "moeca uniform:3, computed step"
FORECAST = "moeca uniform:3, forecast step"
REUSED = "moeca uniform:3, reused step"
CACHED = "moeca, uniform:3, order 1"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    depth: int
    rounds: int  # of single steps
    runs: int  # of whole trajectories
    steps: int  # of a trajectory
    compiles: int  # of each contender, each in a new process


WHOLE = Size(depth=models.DEPTH, rounds=10, runs=3, steps=models.STEPS, compiles=3)
QUICK = Size(depth=2, rounds=2, runs=1, steps=6, compiles=1)


@dataclass(frozen=True)
class Target:
    """One line of the verdict: what was promised, what came out."""

    name: str
    bound: str
    value: float
    met: bool


class Bench:
    """The contenders on one set of weights, and what compiling them showed."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.inputs = models.example_inputs()
        self.shipped = models.network(size.depth)
        prepared = models.network(size.depth)
        moeca.prepare(prepared)
        self.graphs: dict[str, dict[str, int]] = {}
        self.plain_shipped = self._compile(SHIPPED, torch.compile(self.shipped))
        self.plain_prepared = self._compile("torch.compile, prepared", torch.compile(prepared))
        self.full = self._warm(FULL, moeca.compile(prepared, schedule="full"))
        self.forecast = self._warm(CACHED, moeca.compile(prepared, schedule="uniform:3", order=1))
        self.reuse = self._warm("moeca, uniform:3, order 0", moeca.compile(prepared, schedule="uniform:3", order=0))

    def one_step(self) -> dict[str, Timing]:
        """A single call of each contender; of moeca at uniform:3, each kind of step."""
        forecast = models.Walker(self.forecast, Schedule.uniform(3, order=1))
        reuse = models.Walker(self.reuse, Schedule.uniform(3, order=0))
        return interleave(
            {
                "eager, as shipped": lambda: self.shipped(*self.inputs),
                SHIPPED: lambda: self.plain_shipped(*self.inputs),
                "torch.compile, prepared": lambda: self.plain_prepared(*self.inputs),
                FULL: lambda: self.full(*self.inputs),
                COMPUTED: forecast.step,
                FORECAST: forecast.step,
                REUSED: reuse.step,
            },
            rounds=self.size.rounds,
            before={
                COMPUTED: lambda: forecast.walk_to(Action.COMPUTE),
                FORECAST: lambda: forecast.walk_to(Action.FORECAST),
                REUSED: lambda: reuse.walk_to(Action.REUSE),
            },
        )

    def whole_run(self) -> tuple[dict[str, Timing], dict[str, float]]:
        """Whole trajectories; of the cached one also its share of the MACs and the time spent outside its programs."""
        timings = interleave(
            {
                SHIPPED: lambda: models.euler(self.plain_shipped, self.size.steps),
                FULL: lambda: models.euler(self.full, self.size.steps),
                CACHED: lambda: models.euler(self.forecast, self.size.steps),
            },
            rounds=self.size.runs,
            warmup=0,
        )
        stats = moeca.stats(self.forecast)
        in_programs = sum(step.ms for step in stats.steps)
        outside = timings[CACHED].ms[-1] - in_programs
        return timings, {
            "mac_fraction": stats.mac_fraction,
            "state_bytes": stats.state_bytes,
            "overhead_ms_per_step": outside / self.size.steps,
        }

    def _compile(self, name: str, model: Any) -> Any:
        return self._count(name, model, lambda: model(*self.inputs))

    def _warm(self, name: str, model: Any) -> Any:
        return self._count(name, model, lambda: moeca.warmup(model, *self.inputs))

    def _count(self, name: str, model: Any, run: Callable[[], object]) -> Any:
        """Run for the first time and note how many graphs and graph breaks Dynamo counted."""
        counters.clear()
        run()
        breaks = sum(counters["graph_break"].values())
        self.graphs[name] = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}
        return model


def judge(
    step: dict[str, Timing], run: dict[str, Timing], facts: dict[str, float], compiled: dict[str, float]
) -> list[Target]:
    faster = step[FULL].speedup(step[SHIPPED])
    forecast, reused = (1 / step[name].speedup(step[FULL]) for name in (FORECAST, REUSED))
    end_to_end = run[CACHED].speedup(run[FULL]) * facts["mac_fraction"]
    compile_ratio = compiled["moeca"] / compiled["plain"]
    overhead = facts["overhead_ms_per_step"] / step[FULL].median
    return [
        Target("full step over torch.compile as shipped", ">= 1.05", faster, faster >= 1.05),
        Target("forecast step / full step", "<= 0.04", forecast, forecast <= 0.04),
        Target("reused step / full step", "<= 0.04", reused, reused <= 0.04),
        Target("time outside the programs, a step / full step", "< 0.01", overhead, overhead < 0.01),
        Target("end-to-end speedup x MAC fraction", ">= 0.90", end_to_end, end_to_end >= 0.90),
        Target("compile seconds, all variants / torch.compile", "<= 1.30", compile_ratio, compile_ratio <= 1.30),
    ]


def print_targets(targets: Sequence[Target]) -> None:
    table = Table("target", "bound", "measured", "met", title="targets", title_justify="left")
    for target in targets:
        table.add_row(target.name, target.bound, f"{target.value:.3f}", "yes" if target.met else "no")
    Console().print(table)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure steps, runs and compile times.", "two blocks, few rounds")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else WHOLE
    pin_threads()

    costs = compile_seconds.medians(compile_seconds.CONTENDERS, (size.depth,), size.compiles, header=True)
    compiled = {name: seconds[str(size.depth)] for name, seconds in costs.items()}
    bench = Bench(size)
    step = bench.one_step()
    print_table(f"one step, {models.CONFIG}, {size.depth} blocks, batch {models.BATCH}", step, baseline=SHIPPED)
    run, facts = bench.whole_run()
    print_table(f"{size.steps} steps", run, baseline=SHIPPED)
    targets = judge(step, run, facts, compiled)
    print_targets(targets)
    for name, counted in bench.graphs.items():
        print(f"{name}: {counted['graphs']} graphs, {counted['graph_breaks']} kinds of graph break")

    out = folder_of(args)
    if out:
        payload = {
            "model": f"DiT-MoE-{models.CONFIG}, {size.depth} blocks, 256 tokens, batch {models.BATCH}, float32",
            "one_step": as_json(step, baseline=SHIPPED),
            "whole_run": as_json(run, baseline=SHIPPED),
            "facts": facts,
            "compile_seconds": compiled,
            "graphs": bench.graphs,
            "targets": {target.name: {"bound": target.bound, "measured": target.value} for target in targets},
        }
        print(f"written: {save('steps', payload, out).name}")


if __name__ == "__main__":
    main()
