"""Who runs: families in heats, each heat timed in turns with the baseline. The order is that of what matters most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.fitted import CONVERGED, FITTED_REGIONS, UNCACHED
from benchmarks.peers import dbcache, exported, fora, nohit, ours, plain, taylorseer, teacache
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Workload

PAIR = 4  # the interval of TaylorSeer in the table of compile and cache
PAIR_THRESHOLD = 0.12  # of DBCache there
PAIR_BUDGET = "34"  # of moeca there


# of DBCache with random weights: where it hits at times, and often
SPEED_THRESHOLDS = {"peers_s2": (0.8, 1.0), "peers_hidream": (0.6, 0.8)}


def heats(work: Workload, quick: bool = False) -> Mapping[str, Sequence[Family]]:
    if work.speed_only:
        return {"speed": _quick_speed() if quick else _speed(work)}
    return _quick_digits() if quick else _digits()


def _speed(work: Workload) -> list[Family]:
    """All in one heat: where quality can't be told, what counts is how they compare in time."""
    eager, shipped, *_ = plain.uncached()
    thresholds, warmup = SPEED_THRESHOLDS[work.result], min(8, work.size.steps // 4)
    return [
        eager,
        plain.fewer_steps((25, 17))[0],
        fora.family((2, 3)),
        taylorseer.family(1, (2, 3), cold=True),
        dbcache.dynamic(1, 0, warmup, thresholds=thresholds, cold=True),
        dbcache.dynamic(1, 0, warmup, taylor=1, thresholds=thresholds[:1]),
        dbcache.dynamic(2, 0, warmup, thresholds=thresholds[:1]),
        dbcache.dynamic(1, 1, warmup, thresholds=thresholds[:1]),
        ours.full(),
        ours.uniform(1, (2, 3, 4, 6)),
        teacache.family((), (2, 3)),
        exported.uniform((2, 3, 6)),
        shipped,  # last: where Dynamo breaks in a loop it never traces that code again, prepared or not
    ]


def _quick_speed() -> list[Family]:
    """Few, and little to compile."""
    return [
        plain.uncached()[0],
        taylorseer.family(1, (3,), compiled="no"),
        dbcache.dynamic(1, warmup=2, thresholds=(1.0,), compiled="no"),
        ours.uniform(1, (3,), inner="eager"),
    ]


def _digits() -> Mapping[str, Sequence[Family]]:
    return {
        "fewer steps": plain.fewer_steps(),
        "moeca calibrated": [ours.calibrated()],
        "moeca fitted": [
            ours.fitted(UNCACHED),
            ours.fitted(CONVERGED),
            ours.fitted(FITTED_REGIONS),
        ],
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
            exported.calibrated(),
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


def _quick_digits() -> Mapping[str, Sequence[Family]]:
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
