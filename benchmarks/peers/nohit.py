"""Each cache switched on with a setting that never hits: what its machinery costs where it can't help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from benchmarks.peers import dbcache, fora, ours, taylorseer, teacache
from benchmarks.peers.way import Family, Way
from benchmarks.peers.workload import Workload


def families() -> list[Family]:
    return [
        _named(fora.family((1,))),
        replace(_named(taylorseer.family(1)), open=_taylorseer),
        _named(dbcache.dynamic(1, thresholds=(0.0,))),
        _named(dbcache.dynamic(1, taylor=1, thresholds=(0.0,))),
        _named(teacache.family((0.0,))),
        replace(_named(ours.uniform(1)), open=_all_computed),
    ]


def _named(family: Family) -> Family:
    return replace(family, name=f"{family.name}, never a hit")


def _taylorseer(work: Workload) -> Mapping[str, Way]:
    seer = taylorseer.TaylorSeer(work, order=1, compiled="modules")
    return {"": taylorseer.Interval(seer, work, interval=1, warmup=work.size.steps)}


_all_computed: Callable[[Workload], Mapping[str, Way]] = ours.compiled(lambda size: {"": "uniform:1"}, order=1)
