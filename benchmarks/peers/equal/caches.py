"""Caches inside the network, each with settings around those that its documentation recommends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch

from benchmarks.fitted import UNCACHED
from benchmarks.peers import dbcache, fora, hooked_blocks, taylorseer, teacache
from benchmarks.peers.equal import multistep, samplers
from benchmarks.peers.equal.lab import Contender, Lab, Setting
from benchmarks.peers.equal.multistep import Multistep, euler_sum
from benchmarks.peers.thirds import Thirds
from benchmarks.peers.way import Way

THRESHOLDS = (0.06, 0.09, 0.14, 0.2, 0.3, 0.45)  # of DBCache and FirstBlockCache
DRIFTS = (0.05, 0.08, 0.1, 0.13, 0.17, 0.25)  # of TeaCache
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45)  # of SeaCache
POWER = 2.0  # of the spectrum of pictures; SeaCache's default is that of films
INTERVALS = range(2, 9)
FIRST = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}  # where speed counts, by cache-dit's documentation


class Counting(Way, Protocol):
    """A way that knows its full steps."""

    def computed(self) -> int: ...


def contenders() -> list[Contender]:
    def cache_of(name: str, note: str, settings: Callable[[Lab, int], Sequence[Setting]]) -> Contender:
        return Contender(name, "cache", UNCACHED, note, settings)

    return [
        cache_of("TaylorSeer (diffusers)", "orders 1 and 2, interval, warm-up, cool-down", _taylorseer(lite=False)),
        cache_of("TaylorSeer (diffusers), lite", "the same, the last layer's output forecast", _taylorseer(lite=True)),
        cache_of("cache-dit, calibrated mask", "steps of DPCache, of moeca; no forecast, Taylor, DMD, FoCa", _masks),
        cache_of("cache-dit, calibrated mask, dynamic policy", "half of the steps by mask, thresholds", _dynamic_masks),
        cache_of("cache-dit, DBCache", "thresholds; Taylor; at most 3 cached in a row", _dbcache),
        cache_of("MagCache (diffusers)", "threshold, longest skip, retention; ratios of a run", _mag_cache),
        cache_of("SeaCache (diffusers)", "threshold; residual orders 0 and 1", _sea_cache),
        cache_of("FirstBlockCache (diffusers)", "threshold", _first_block_cache),
        cache_of("TeaCache-like", "threshold; polynomial of degree 4 fitted on other digits", _teacache),
        cache_of("FORA-like copy", "interval", _fora),
    ]


def _of(label: str, way: Counting) -> Setting:
    return Setting(label, way.sample, lambda: (way.computed(), way.macs()))


def _with_steps(label: str, way: Way, computed: int) -> Setting:
    return Setting(label, way.sample, lambda: (computed, way.macs()))


@cache
def _seer(lab: Lab, order: int, lite: bool) -> taylorseer.TaylorSeer:
    return taylorseer.TaylorSeer(lab.work, order, "no", lite)


def _taylorseer(lite: bool) -> Callable[[Lab, int], list[Setting]]:
    """The best few of all that fit, by the error on recorded outputs of the same forecast of the output."""

    def settings(lab: Lab, count: int) -> list[Setting]:
        steps = lab.size.steps
        rules: dict[str, Multistep] = {}
        fitting: dict[str, Setting] = {}
        cooldowns = (None, *range(steps - 5, steps))
        for order, interval, warmup, cooldown in itertools.product((1, 2), INTERVALS, range(1, 6), cooldowns):
            at = [step for step in range(steps) if taylorseer.computes(step, interval, warmup, cooldown)]
            if not count - 1 <= len(at) <= count:
                continue
            label = f"order {order}, N={interval}, before {warmup}, after {cooldown}"
            rules[label] = multistep.polynomial(at, steps, order, euler_sum)
            way = taylorseer.Interval(_seer(lab, order, lite), lab.work, interval, warmup, cooldown)
            fitting[label] = _with_steps(label, way, len(at))
        return [fitting[label] for label in samplers.best_of(lab, rules)]

    return settings


@cache
def _cached(lab: Lab, taylor: int = 0, calibrator: str = "", **config: Any) -> dbcache.DBCache:
    return dbcache.DBCache(lab.work, taylor, "no", calibrator, **FIRST, **config)


def _mask(lab: Lab, steps: Sequence[int]) -> list[int]:
    return [int(step in steps) for step in range(lab.size.steps)]


def _masks(lab: Lab, count: int) -> list[Setting]:
    """Static, at the steps that are placed for a line, and at moeca's."""
    places = {"placed": samplers.dpcache_steps(lab, count), "moeca's": lab.computed[count]}
    forecasts: dict[str, dict[str, Any]] = {
        "no forecast": {}, "Taylor 1": {"taylor": 1}, "DMD": {"calibrator": "dmd"}, "FoCa": {"calibrator": "foca"},
    }  # fmt: skip
    fitting = []
    for (place, steps), (name, options) in itertools.product(places.items(), forecasts.items()):
        if place != "placed" and name != "Taylor 1":
            continue
        cached = _cached(lab, **options)
        fields = {"steps_computation_mask": _mask(lab, steps), "steps_computation_policy": "static"}
        fitting.append(_of(f"{count}: {place}, {name}", dbcache.Setting(cached, lab.work, **fields)))
    return fitting


def _dynamic_masks(lab: Lab, count: int) -> list[Setting]:
    """The mask says which steps are computed at least; the threshold, which others are."""
    mask = _mask(lab, samplers.dpcache_steps(lab, max(2, count // 2)))
    fitting = []
    for threshold in THRESHOLDS[1:5]:
        fields = {"steps_computation_mask": mask, "steps_computation_policy": "dynamic"}
        way = dbcache.Setting(_cached(lab, taylor=1), lab.work, residual_diff_threshold=threshold, **fields)
        fitting.append(_of(f"{count}: {threshold:g}", way))
    return fitting


def _dbcache(lab: Lab, count: int) -> list[Setting]:
    fitting = []
    for taylor, most, threshold in itertools.product((0, 1), (-1, 3), THRESHOLDS[1:]):
        cached = _cached(lab, taylor=taylor, max_warmup_steps=4)
        limits = {"residual_diff_threshold": threshold, "max_continuous_cached_steps": most}
        label = f"threshold {threshold:g}, Taylor {taylor}, at most {most} cached in a row"
        fitting.append(_of(label, dbcache.Setting(cached, lab.work, **limits)))
    return fitting


@cache
def _mag(lab: Lab) -> hooked_blocks.HookedBlocks:
    return hooked_blocks.mag_cache(lab.work, lab.few)


def _mag_cache(lab: Lab, count: int) -> list[Setting]:
    """One setting for each number of steps in a row and each retention: the threshold that computes most."""
    mag = _mag(lab)
    ratios = torch.as_tensor(mag.config.mag_ratios)
    fitting = {}
    for skip, retention, threshold in itertools.product((2, 3, 4, 6, 8), (0.04, 0.1, 0.2), torch.logspace(-3, 0.5, 60)):
        fields = {"threshold": float(threshold), "max_skip_steps": skip, "retention_ratio": retention}
        if count - 1 <= hooked_blocks.mag_computes(ratios, **fields) <= count:
            label = f"longest skip {skip}, retention {retention:g}"
            fitting.setdefault(label, _of(f"{count}: {label}", hooked_blocks.Setting(mag, **fields)))
    return list(fitting.values())


@cache
def _sea(lab: Lab) -> hooked_blocks.HookedBlocks:
    return hooked_blocks.sea_cache(lab.work)


def _sea_cache(lab: Lab, count: int) -> list[Setting]:
    fitting = []
    for order, budget in itertools.product((0, 1), BUDGETS):
        fields = {"threshold": budget, "residual_order": order, "power_exp": POWER, "max_consecutive_cached": 0}
        label = f"threshold {budget:g}, residual order {order}"
        fitting.append(_of(label, hooked_blocks.Setting(_sea(lab), **fields)))
    return fitting


@cache
def _first(lab: Lab) -> hooked_blocks.HookedBlocks:
    return hooked_blocks.first_block_cache(lab.work)


def _first_block_cache(lab: Lab, count: int) -> list[Setting]:
    return [
        _of(f"threshold {threshold:g}", hooked_blocks.Setting(_first(lab), head=1, threshold=threshold))
        for threshold in THRESHOLDS
    ]


@cache
def _thirds(lab: Lab) -> Thirds:
    return Thirds(lab.work, compiled=False)


def _teacache(lab: Lab, count: int) -> list[Setting]:
    return [
        _of(f"threshold {threshold:g}", teacache.Setting(_thirds(lab), lab.work, threshold)) for threshold in DRIFTS
    ]


@cache
def _copies(lab: Lab) -> fora.Fora:
    return fora.Fora(lab.work, compiled=False)


def _fora(lab: Lab, count: int) -> list[Setting]:
    steps = lab.size.steps
    fitting = [interval for interval in INTERVALS if len(range(0, steps, interval)) <= count]
    interval = min(fitting)
    return [
        _with_steps(f"N={interval}", fora.Interval(_copies(lab), lab.work, interval), len(range(0, steps, interval)))
    ]
