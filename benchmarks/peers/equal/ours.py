"""moeca's families: the schedules of `benchmarks.fitted`, and those that need no calibration."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from benchmarks.fitted import UNCACHED, computed
from benchmarks.peers import ours
from benchmarks.peers.equal.lab import Contender, Lab, Setting
from benchmarks.peers.workload import Batch

SHARES = {25: "50", 17: "34", 13: "26", 10: "20"}  # of the committed schedules


def contenders() -> list[Contender]:
    return [
        Contender("moeca uniform", "moeca", UNCACHED, "intervals and warm-ups that fit, orders 1 and 2", _uniform),
        Contender("moeca calibrated, one span", "moeca", UNCACHED, "the steps of the committed schedule", _one_span),
    ]


def _uniform(lab: Lab, count: int) -> list[Setting]:
    """Of each interval the longest warm-up that fits, with both orders."""
    steps = lab.size.steps
    fitting: dict[int, tuple[int, int]] = {}
    for interval, warmup in itertools.product(range(2, 9), range(1, 7)):
        full = warmup + len(range(warmup + interval - 1, steps, interval))
        if count - 2 <= full <= count:
            fitting[interval] = warmup, full
    settings = []
    for interval, (warmup, full) in fitting.items():
        text = f"uniform:{interval}:warmup={warmup}"
        settings += [_setting(lab, f"{text}, order {order}", full, schedule=text, order=order) for order in (1, 2)]
    return settings


def _one_span(lab: Lab, count: int) -> list[Setting]:
    schedule = ours.as_one_span(ours.load(SHARES[count]))
    return [_setting(lab, f"{SHARES[count]} %", computed(schedule), schedule=schedule, granularity="stack")]


def _setting(lab: Lab, label: str, full: int, **options: Any) -> Setting:
    """Compiled at its first trajectory. Eager: the images are the same, and nothing is timed."""
    opened: list[ours.Moeca] = []

    def draw(batch: Batch) -> Tensor:
        if not opened:
            opened.append(ours.Moeca(lab.work.prepared(), lab.work, inner="eager", **options))
        return opened[0].sample(batch)

    return Setting(label, draw, lambda: (full, opened[0].macs()))
