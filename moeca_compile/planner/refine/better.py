"""A schedule that rollouts found better than the plan that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.study import Study
from moeca_compile.schedule import Schedule

BETTER_DB = 0.02  # a smaller gain does not justify another kind of row, or more kept values


@dataclass(frozen=True)
class BetterSchedule:
    """The best of what was tried.

    Attributes:
        schedule: the best one; the plan's own if nothing was better.
        ways: the names of what makes it better, in order; none: it is the plan's own.
        quality: on all seeds, dB.
        tried: for each thing that was tried, the quality on the seeds that it ran on, dB.
        mac_fraction: of the schedule, as in `Costs`.
        state_bytes: of the schedule, as in `Costs`.
        kept_as: the plan by which its rollouts are kept; None: they aren't.
    """

    schedule: Schedule
    ways: tuple[str, ...]
    quality: float
    tried: Mapping[str, float]
    mac_fraction: float = 1.0
    state_bytes: int = 0
    kept_as: Plan | None = None


def with_costs(study: Study, better: BetterSchedule) -> BetterSchedule:
    """The same with what its schedule costs."""
    compiled = study.sampled.program.compiled(better.schedule)
    macs = [compiled.variants.variant(row).macs for row in better.schedule.rows]
    state_bytes = sum(slot.bytes for slot in compiled.layout)
    return replace(better, mac_fraction=sum(macs) / (macs[0] * len(macs)), state_bytes=state_bytes)
