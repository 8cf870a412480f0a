"""Who runs: families in heats, each heat timed in turns with the baseline. The order is that of what matters most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.peers import dbcache, exported, fora, nohit, ours, plain, taylorseer, teacache
from benchmarks.peers.way import Family

PAIR = 4  # the interval of TaylorSeer in the table of compile and cache
PAIR_THRESHOLD = 0.12  # of DBCache there
PAIR_BUDGET = "34"  # of moeca there


def heats() -> Mapping[str, Sequence[Family]]:
    return {
        "fewer steps": plain.fewer_steps(),
        "moeca calibrated": [ours.calibrated()],
        "TaylorSeer, order 1": [taylorseer.family(1, cold=True)],
        "DBCache": [dbcache.dynamic(1, cold=True), dbcache.dynamic(1, warmup=4)],
        "uncached": [*plain.uncached(), ours.full()],
        "DBCache with Taylor, masks": [
            dbcache.dynamic(1, warmup=4, taylor=1),
            dbcache.masks(),
            dbcache.masks(taylor=1),
        ],
        "TeaCache, FORA": [teacache.family(), fora.family()],
        "moeca, one span and uniform": [ours.one_span(), ours.uniform(1, (2, 3, 4, 5, 6)), ours.uniform(0, (3,))],
        "compile and cache, never a hit": [*compile_and_cache(), *nohit.families(), taylorseer.family(2, (3, 5))],
        "random, adaptive, by branches": [ours.randomised(), ours.adaptive(), ours.branches()],
        "packed experts, onnxruntime": [
            ours.full(pack_experts=True),
            ours.calibrated(("50", "20"), pack_experts=True),
            exported.family(),
        ],
    }


def compile_and_cache() -> list[Family]:
    """Eager, cached: what compiling adds is the distance to the same settings in the other heats. And the other way
    of compiling the peers."""
    return [
        taylorseer.family(1, (PAIR,), compiled="no"),
        taylorseer.family(1, (PAIR,), compiled="whole"),
        dbcache.dynamic(1, thresholds=(PAIR_THRESHOLD,), compiled="no"),
        dbcache.dynamic(1, thresholds=(PAIR_THRESHOLD,), compiled="whole"),
        ours.calibrated((PAIR_BUDGET,), inner="eager"),
    ]


def quick() -> Mapping[str, Sequence[Family]]:
    """One setting of each kind of contender."""
    return {
        "peers": [
            plain.fewer_steps()[0],
            taylorseer.family(1, (3,), compiled="no"),
            dbcache.dynamic(1, warmup=2, thresholds=(0.5,), compiled="no"),
            teacache.family((0.4,)),
        ],
        "moeca": [ours.uniform(1, (3,))],
    }
