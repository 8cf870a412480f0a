"""Peers that leave the network as it is: solvers on placed times, and forecasts of the guided output in the sampler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.peers.equal import dpcache, multistep, schedulers, spectrum
from benchmarks.peers.equal.lab import Contender, Lab, Setting
from benchmarks.peers.equal.multistep import Guided, Multistep, euler_sum, integral
from benchmarks.peers.workload import Batch

ROLLED_OUT = 3  # of many forecasts that are ranked by their error on the recorded outputs


def contenders() -> list[Contender]:
    grids = (
        "six grids: even, placed by annealing and by dynamic programming for two orders each, and where moeca computes"
    )
    return [
        *(
            Contender(f"calibrated multistep, fitted to {truth}", "sampler", truth, "least squares", _fitted(truth))
            for truth in (UNCACHED, CONVERGED)
        ),
        Contender("calibrated multistep, polynomial", "sampler", UNCACHED, "orders 1 and 2, placed each", _polynomials),
        Contender("Adams-Bashforth 2, optimized times", "sampler", CONVERGED, grids, _adams_bashforth(1)),
        Contender("Adams-Bashforth 3, optimized times", "sampler", CONVERGED, grids, _adams_bashforth(2)),
        Contender("UniPC (diffusers), optimized times", "sampler", CONVERGED, grids, _scheduler(schedulers.unipc)),
        Contender("DPM++ (diffusers), optimized times", "sampler", CONVERGED, grids, _scheduler(schedulers.dpm)),
        Contender(
            "DPCache-like", "sampler", UNCACHED, "forecasts of orders 1 and 2, steps placed for order 1", _dpcache
        ),
        Contender("Spectrum-like", "sampler", UNCACHED, "steps, degree, ridge, share of a line", _spectrum),
    ]


def _drawn(lab: Lab, label: str, sample: Callable[[Guided, Tensor], Tensor], count: int) -> Setting:
    def draw(batch: Batch) -> Tensor:
        return sample(lab.guided(batch), batch.noise)

    return Setting(label, draw, lambda: (count, count / lab.size.steps))


def _rule(lab: Lab, label: str, rule: Multistep) -> Setting:
    return _drawn(lab, label, rule.sample, len(rule.at))


def _grids(lab: Lab, count: int) -> dict[str, list[int]]:
    """Computed ones of the converged run's steps."""
    finer, gram = lab.size.finer, lab.grams[CONVERGED]
    fine = len(gram)
    states, outputs = lab.recorded[CONVERGED]
    programmed = {
        order: dpcache.path(dpcache.of_steps(states[::finer], outputs[::finer], order), count) for order in (0, 1)
    }
    return {
        "even": [round(index * fine / count) for index in range(count)],
        "placed for order 2": multistep.place(gram, count, 1, integral),
        "placed for order 3": multistep.place(gram, count, 2, integral),
        "dynamic programming, order 1": [finer * step for step in programmed[0]],
        "dynamic programming, order 2": [finer * step for step in programmed[1]],
        "moeca's": [finer * step for step in lab.computed[count]],
    }


def _adams_bashforth(order: int) -> Callable[[Lab, int], list[Setting]]:
    def settings(lab: Lab, count: int) -> list[Setting]:
        fine = lab.size.steps * lab.size.finer
        grids = _grids(lab, count)
        rules = {name: multistep.polynomial(at, fine, order, integral) for name, at in grids.items()}
        return [_rule(lab, f"{count}: {name}", rule) for name, rule in rules.items()]

    return settings


def _scheduler(sampler: schedulers.Sampler) -> Callable[[Lab, int], list[Setting]]:
    def settings(lab: Lab, count: int) -> list[Setting]:
        fine = lab.size.steps * lab.size.finer
        placed = []
        for order, (name, at) in itertools.product((3, 2), _grids(lab, count).items()):
            if order == 3 or name.startswith("placed"):
                sigmas = [1 - step / fine for step in at]
                placed.append(_drawn(lab, f"{count}: {name}, order {order}", sampler(sigmas, order), count))
        return placed

    return settings


def _fitted(truth: str) -> Callable[[Lab, int], list[Setting]]:
    """Placed for order 2 against the uncached run, as the polynomial is; and where moeca computes."""

    def settings(lab: Lab, count: int) -> list[Setting]:
        states = lab.recorded[truth][0][:: 1 if truth == UNCACHED else lab.size.finer]
        places = {"placed": multistep.place(lab.grams[UNCACHED], count, 2, euler_sum), "moeca's": lab.computed[count]}
        guided = lab.guided(lab.batch)
        rules = {name: multistep.fitted(at, guided, states) for name, at in places.items()}
        return [_rule(lab, f"{count}: {name}", rule) for name, rule in rules.items()]

    return settings


def _polynomials(lab: Lab, count: int) -> list[Setting]:
    placed = []
    for order in (1, 2):
        at = multistep.place(lab.grams[UNCACHED], count, order, euler_sum)
        placed.append(_rule(lab, f"{count}: order {order}", multistep.polynomial(at, lab.size.steps, order, euler_sum)))
    return placed


def dpcache_steps(lab: Lab, count: int) -> list[int]:
    return dpcache.path(dpcache.of_forecasts(lab.grams[UNCACHED]), count)


def _dpcache(lab: Lab, count: int) -> list[Setting]:
    at = dpcache_steps(lab, count)
    rules = {order: multistep.polynomial(at, lab.size.steps, order, euler_sum) for order in (1, 2)}
    return [_rule(lab, f"{count}: order {order}", rule) for order, rule in rules.items()]


def _spectrum(lab: Lab, count: int) -> list[Setting]:
    """The best few of all by their error on recorded outputs: its own steps, and those that others placed."""
    steps = lab.size.steps
    places = {f"warm-up {warmup}": spectrum.growing(steps, count, warmup) for warmup in (2, 3, 5)}
    places |= {"placed": dpcache_steps(lab, count), "moeca's": list(lab.computed[count])}
    rules: dict[str, Multistep] = {}
    for (place, at), degree, ridge, local in itertools.product(
        places.items(), (3, 4, 6), (1e-3, 1e-2, 0.1), (0.0, 0.5)
    ):
        label = f"{count}: {place}, degree {degree}, ridge {ridge:g}, line {local:g}"
        rules[label] = multistep.forecast(at, steps, spectrum.weigher(steps, degree, ridge, local))
    return ranked(lab, rules)


def ranked(lab: Lab, rules: dict[str, Multistep]) -> list[Setting]:
    return [_rule(lab, label, rules[label]) for label in best_of(lab, rules)]


def best_of(lab: Lab, rules: dict[str, Multistep], most: int = ROLLED_OUT) -> Sequence[str]:
    """The labels of those with the least error on the recorded outputs."""
    gram = lab.grams[UNCACHED]
    return sorted(rules, key=lambda label: multistep.surrogate(rules[label], gram))[:most]
