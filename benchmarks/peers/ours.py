"""moeca's own ways: uniform, calibrated, fitted, by branches, adaptive. Control: random schedules."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

import moeca_compile as moeca
from benchmarks import policies_jobs as jobs
from benchmarks.fitted import FITTED_REGIONS, KEPT, WHOLE, WORK, Bench
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Batch, Size, Workload
from benchmarks.tasks import DIGITS
from moeca_compile.schedule import Schedule

BUDGETS = ("70", "50", "34", "26", "20", "16", "13")
COMPUTED = (25, 17, 13, 10)  # full steps of the random schedules: what uniform:2, 3, 4 and 5 compute
RANDOM_SEEDS = 2
OUTPUT_SHARES = (50, 34, 26, 20, 16)  # fewer steps: a cheap one costs nearly nothing
C, F = jobs.C, jobs.F
SPAN = f"blocks.0..blocks.{jobs.BLOCKS - 1}"  # the key of the whole stack


class Moeca:
    """A compiled schedule."""

    def __init__(self, model: Any, work: Workload, schedule: Any, **options: Any) -> None:
        self.model, self.work = moeca.compile(model, schedule=schedule, **options), work
        self.options = {"schedule": schedule, **options}

    def sample(self, batch: Batch) -> Tensor:
        steps = self.work.size.steps
        times = [1000.0 * (1 - step / steps) for step in range(steps)]
        with moeca.trajectory(self.model, steps=steps, timesteps=times, frozen=True):
            return self.work.draw(self.model, batch)

    def macs(self) -> float:
        return moeca.stats(self.model).mac_fraction

    def state_bytes(self) -> int:
        stats = moeca.stats(self.model)
        return stats.state_bytes + stats.hoisted_bytes

    def told_bytes(self) -> int:
        """By `moeca.explain` of another instance, which runs no step."""
        inputs = self.work.inputs_of(self.work.batches()[0])
        return moeca.explain(self.work.prepared(), *inputs, **self.options).state_bytes

    def held_bytes(self) -> int:
        return moeca.stats(self.model).state_bytes

    def forget(self) -> None:
        moeca.reset(self.model)


def compiled(
    schedules: Callable[[Size], Mapping[str, Any]], **options: Any
) -> Callable[[Workload], Mapping[str, Moeca]]:
    """Each a compile of its own, of an instance of its own: two compiles of one instance may trace each other anew."""

    def opened(work: Workload) -> Mapping[str, Moeca]:
        return {name: Moeca(work.prepared(), work, one, **options) for name, one in schedules(work.size).items()}

    return opened


def full(**options: Any) -> Family:
    name = "moeca, everything computed" + _told(options)
    return Family(name, "moeca", 'schedule="full"', compiled(lambda size: {"": "full"}, **options), cold=not options)


def _told(options: Mapping[str, Any]) -> str:
    """What a family's name adds for options that aren't the defaults."""
    return (", eager" if options.get("inner") == "eager" else "") + (", packed" if options.get("pack_experts") else "")


def uniform(order: int, intervals: tuple[int, ...] = (2, 3, 4, 5, 6, 8), **options: Any) -> Family:
    """Two full steps, then every N-th."""
    names = {f"N={interval}": f"uniform:{interval}:warmup=2" for interval in intervals}
    note = f"two full steps, then every N-th; order {order} between them"
    name = f"moeca uniform, order {order}" + _told(options)
    return Family(name, "moeca", note, compiled(lambda size: names, order=order, **options), cold=order == 1)


def calibrated(budgets: tuple[str, ...] = BUDGETS, **options: Any) -> Family:
    note = "moeca.calibrate for a share of the MACs, on 16 seeds; examples/schedules"
    name = "moeca calibrated" + _told(options)
    schedules = compiled(lambda size: {f"{one} %": load(one) for one in budgets}, **options)
    return Family(name, "moeca", note, schedules, cold=not options)


def fitted(kind: str, shares: tuple[int, ...] = ()) -> Family:
    """Schedules that `calibrate_front` gave weights where it found better ones than the polynomial's.

    They are those of `benchmarks.fitted`. What isn't committed is calibrated, which says so, and kept beside those.

    Args:
        kind: `FITTED_REGIONS`, or the truth of the output's weights, `UNCACHED` or `CONVERGED`.
        shares: of the steps, in percent; default: `BUDGETS` for regions, `OUTPUT_SHARES` for the output.
    """
    of_regions = kind == FITTED_REGIONS
    shares = shares or (tuple(map(int, BUDGETS)) if of_regions else OUTPUT_SHARES)

    def schedules(size: Size) -> Mapping[str, Schedule]:
        bench = Bench(replace(WHOLE, shares=shares), WORK / DIGITS.name, DIGITS)
        is_complete = all(bench.known(share, kind) for share in shares)
        found = {share: bench.schedule(share, kind) for share in shares}
        if not is_complete:
            bench.keep(KEPT)
        return {f"{share} %" + _none_better(schedule): schedule for share, schedule in found.items()}

    name = "regions" if of_regions else f"output, {kind}"
    note = "moeca.calibrate_front on 8 seeds of 8 digits, weights fitted where better; benchmarks/results/schedules"
    granularity = "region" if of_regions else "output"
    return Family(f"moeca fitted {name}", "moeca", note, compiled(schedules, granularity=granularity))


def _none_better(schedule: Schedule) -> str:
    """What a setting's name adds for a schedule with the polynomial's weights."""
    return "" if schedule.fitted or schedule.output else ", none better"


def one_span(budgets: tuple[str, ...] = ("34", "26", "20", "16", "13")) -> Family:
    """The same steps in full, what leaves the blocks forecast as one: less state to read at each cheap step."""

    def schedules(size: Size) -> Mapping[str, Schedule]:
        return {f"{one} %": as_one_span(load(one)) for one in budgets}

    note = 'the calibrated full steps under granularity="stack", which calibrate(granularity="auto") tries too'
    return Family("moeca calibrated, one span", "moeca", note, compiled(schedules, granularity="stack"))


def as_one_span(schedule: Schedule) -> Schedule:
    """The same full steps; the columns become one."""
    rows = tuple(row[:1] for row in schedule.rows)
    return Schedule(rows, (SPAN,), order=schedule.order, timesteps=schedule.timesteps, granularity="stack")


def branches(budgets: tuple[str, ...] = ("50", "20")) -> Family:
    """The calibrated placement, with the transitions of the routers computed between full steps."""
    transitions, attention = jobs.Idea((jobs.TRANSITIONS,)), jobs.Idea(((C, F) * jobs.BLOCKS,))

    def schedules(size: Size) -> Mapping[str, Schedule]:
        found = {f"{one} %, tau {jobs.TAU}": jobs.with_idea(load(one), transitions) for one in budgets}
        return {**found, "uniform:4, attention every step": jobs.with_idea(jobs.uniform(4), attention)}

    return Family("moeca by branches", "moeca", "docs/branch-caching.md", compiled(schedules))


def adaptive(thresholds: tuple[float, ...] = (0.02, 0.05, 0.1)) -> Family:
    def schedules(size: Size) -> Mapping[str, Schedule]:
        return {f"{one:g}": jobs.adaptive(one, (F, F)) for one in thresholds}

    return Family("moeca adaptive", "moeca", "a full step where the first input drifted that far", compiled(schedules))


def randomised() -> Family:
    """Which steps are full is drawn: what calibrating and spacing are worth is the distance to these."""

    def schedules(size: Size) -> Mapping[str, Schedule]:
        counts = [max(2, round(count * size.steps / jobs.STEPS)) for count in COMPUTED]
        return {
            f"{count} of {size.steps}, draw {seed}": random_schedule(size.steps, count, seed)
            for count in counts
            for seed in range(RANDOM_SEEDS)
        }

    return Family("random full steps, order 1", "control", "run by moeca like its own", compiled(schedules))


def random_schedule(steps: int, computed: int, seed: int) -> Schedule:
    """The first step and `computed - 1` others are full."""
    drawn = {0, *random.Random(seed).sample(range(1, steps), computed - 1)}
    rows = tuple((C if step in drawn else F,) * len(jobs.KEYS) for step in range(steps))
    return Schedule(rows, jobs.KEYS, order=1, made_by=f"random:{computed}:seed={seed}")


def load(budget: str) -> Schedule:
    return Schedule.load(jobs.SCHEDULES / jobs.file_of("dit_moe", budget, 0.0))
