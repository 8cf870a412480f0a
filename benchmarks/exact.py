"""The exact optimisations, each by itself, on DiT-MoE-S/2-8E2A; and what a cache gives end to end at intervals 2 to 6.

    python -m benchmarks.exact            # about 30 minutes on one core; writes results/exact.json
    python -m benchmarks.exact --again computed    # one section anew
    python -m benchmarks.exact --report   # docs/exact.md from it
    python -m benchmarks.exact --quick    # two blocks, few rounds: does it run?

A step is a single call; `hoisted` steps are those of a trajectory whose timesteps are known (from the one before), so
that their step-only values come out of a table; the table's own cost is in the whole runs, which are told their
timesteps and walk side by side, a step of each in turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moeca_compile as moeca
from benchmarks import compile_seconds, models
from benchmarks.exact_report import page
from benchmarks.protocol import (
    RESULTS,
    Timing,
    arguments,
    as_json,
    folder_of,
    in_step,
    interleave,
    pin_threads,
    print_table,
    save,
)
from benchmarks.steps import Target, print_targets
from moeca_compile.schedule import Schedule

SECTIONS = ("computed", "reused", "runs", "compiling")
NEW, SECOND = "new machine", "header there"
COMPILED = {"each": ("each block for itself", 1.3), "moeca": ("equal blocks once", 0.6)}
SHIPPED, PREPARED = "torch.compile, as shipped", "torch.compile, prepared"
WHOLE, LEAN, PACKED = "moeca, nothing hoisted", "moeca", "moeca, packed experts"
FORMS: dict[str, dict[str, Any]] = {LEAN: {}, PACKED: {"pack_experts": True}}  # `full` hoists nothing
INTERVALS = (2, 3, 4, 5, 6)
PAGE = Path("docs/exact.md")


@dataclass(frozen=True)
class Size:
    depth: int
    rounds: int
    runs: int
    steps: int
    compiled: tuple[int, ...]  # depths
    compiles: int  # of each


ALL = Size(depth=models.DEPTH, rounds=16, runs=2, steps=models.STEPS, compiled=(12, 28), compiles=2)
QUICK = Size(depth=2, rounds=2, runs=1, steps=8, compiled=(1,), compiles=1)


class Bench:
    """One set of weights, as shipped and prepared."""

    def __init__(self, size: Size) -> None:
        self.size, self.inputs = size, models.example_inputs()
        self.shipped, self.prepared = models.network(size.depth), models.network(size.depth)
        moeca.prepare(self.prepared)

    def compiled(self, schedule: str, **options: Any) -> Any:
        model = moeca.compile(self.prepared, schedule=schedule, order=1, **options)
        moeca.warmup(model, *self.inputs)
        return model

    def computed(self) -> dict[str, Timing]:
        """One step with everything computed."""
        plain: dict[str, Callable[[], object]] = {}
        for name, model in ((SHIPPED, self.shipped), (PREPARED, self.prepared)):
            plain[name] = partial(torch.compile(model), *self.inputs)
            plain[name]()
        rounds = self.size.rounds
        walkers = {name: self._walker("full", rounds, options) for name, options in FORMS.items()}
        ours = {name: walker.step for name, walker in walkers.items()}
        return interleave({**plain, **ours}, rounds=rounds)

    def reused(self) -> dict[str, Timing]:
        """One step of a long stretch that forecasts every region."""
        forms: dict[str, dict[str, Any]] = {
            WHOLE: {"disable": ("hoist_step_only", "hoist_invariant")},
            "moeca, invariants hoisted": {"disable": ("hoist_step_only",)},
            LEAN: {},
        }
        rounds = 3 * self.size.rounds
        walkers = {name: self._walker("uniform:1000:warmup=2", rounds, options) for name, options in forms.items()}
        return interleave({name: one.step for name, one in walkers.items()}, rounds=rounds)

    def runs(self) -> tuple[dict[str, Timing], dict[str, float]]:
        """Whole trajectories, and the share of the MACs that each one of moeca's executed."""
        schedules = {"full": "full"} | {f"interval {k}": f"uniform:{k}" for k in INTERVALS}
        made = {name: self.compiled(schedule) for name, schedule in schedules.items()}
        steps = self.size.steps

        def told(model: Any) -> Iterator[Tensor]:
            return models.walk(model, steps, moeca.trajectory(model, steps, timesteps=models.timesteps(steps)))

        walks: dict[str, Callable[[], Iterator[Tensor]]] = {name: partial(told, model) for name, model in made.items()}
        walks[PREPARED] = partial(models.walk, torch.compile(self.prepared), steps)
        for begin in walks.values():  # compiles
            next(begin())
        timings = in_step(walks, rounds=self.size.runs)
        return timings, {name: moeca.stats(model).mac_fraction for name, model in made.items()}

    def _walker(self, schedule: str, rounds: int, options: dict[str, Any]) -> models.Walker:
        """Some steps into a trajectory whose timesteps are known: those of one before it, which was long enough."""
        model = self.compiled(schedule, **options)
        for steps in (rounds + 6, 3):
            walker = models.Walker(model, Schedule.full())
            for _ in range(steps):
                walker.step()
        return walker


Seconds = dict[str, dict[str, float]]  # by contender and depth


def compile_costs(size: Size) -> dict[str, Seconds]:
    """Of a machine whose torch never compiled anything, and of one that has the header that all kernels include."""
    kinds = {NEW: (compile_seconds.CONTENDERS, False), SECOND: (("plain", "moeca"), True)}
    return {
        kind: compile_seconds.medians(contenders, size.compiled, size.compiles, header)
        for kind, (contenders, header) in kinds.items()
    }


def judge(found: Mapping[str, Any]) -> list[Target]:
    computed, reused, runs, macs = (found[name] for name in ("computed", "reused", "runs", "mac_fraction"))
    best = min((LEAN, PACKED), key=lambda name: float(computed[name]["median_ms"]))
    over = computed[best]["speedup"]
    slower = computed[LEAN]["median_ms"] / computed[PREPARED]["median_ms"]
    share = reused[LEAN]["median_ms"] / computed[LEAN]["median_ms"]
    targets = [
        Target(f"everything computed ({best}) over torch.compile as shipped", ">= 1.10", over, over >= 1.1),
        Target("moeca / torch.compile on the prepared model, milliseconds", "<= 1.02", slower, slower <= 1.02),
        Target("forecast step / full step", "<= 0.012", share, share <= 0.012),
    ]
    for k in INTERVALS:
        name, bound = f"interval {k}", 0.95 if k <= 3 else 0.9
        reached = runs[name]["speedup"] * macs[name]
        targets.append(Target(f"{name}: speedup x MAC fraction", f">= {bound:.2f}", reached, reached >= bound))
    seconds = found["compile_seconds"][NEW]  # all caches cold
    for depth, plain in seconds["plain"].items():
        for name, (says, bound) in COMPILED.items():
            ratio = seconds[name][depth] / plain
            what = f"compile seconds, {depth} blocks, {says} / torch.compile"
            targets.append(Target(what, f"<= {bound:.1f}", ratio, ratio <= bound))
    return targets


def measure(size: Size, sections: Sequence[str]) -> dict[str, Any]:
    """What the page's sections need."""
    bench, found = Bench(size), dict[str, Any]()
    if "computed" in sections:
        computed = bench.computed()
        print_table(f"everything computed, {models.CONFIG}, {size.depth} blocks", computed, baseline=SHIPPED)
        found["computed"] = as_json(computed, baseline=SHIPPED)
    if "reused" in sections:
        reused = bench.reused()
        print_table("a forecast step", reused, baseline=WHOLE)
        found["reused"] = as_json(reused, baseline=WHOLE)
    if "runs" in sections:
        runs, found["mac_fraction"] = bench.runs()
        print_table(f"{size.steps} steps", runs, baseline="full")
        found["runs"] = as_json(runs, baseline="full")
    if "compiling" in sections:
        found["compile_seconds"] = compile_costs(size)
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure the exact optimisations and whole cached runs.", "two blocks, few rounds")
    parser.add_argument("--report", action="store_true", help="write docs/exact.md from the results")
    parser.add_argument("--again", nargs="+", choices=SECTIONS, help="measure these anew and keep the others' results")
    args = parser.parse_args(argv)
    if args.report:
        PAGE.write_text(page(json.loads((RESULTS / "exact.json").read_text())))
        return
    size, out = QUICK if args.quick else ALL, folder_of(args)
    pin_threads()
    kept = json.loads(((out or RESULTS) / "exact.json").read_text()) if args.again else {}
    found = {**kept, **measure(size, args.again or SECTIONS)}
    targets = judge(found)
    print_targets(targets)
    if out:
        payload = {
            **{name: one for name, one in found.items() if name != "machine"},
            "model": f"DiT-MoE-{models.CONFIG}, {size.depth} blocks, 256 tokens, batch {models.BATCH}, float32",
            "targets": {one.name: {"bound": one.bound, "measured": one.value, "met": one.met} for one in targets},
        }
        print(f"written: {save('exact', payload, out).name}")


if __name__ == "__main__":
    main()
