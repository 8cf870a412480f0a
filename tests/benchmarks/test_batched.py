"""`benchmarks.batched`: the simulation serves everybody, and sharing calls helps where calls have fixed costs."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.batched import Kind, evenness, first_request, phase_offsets, simulate
from moeca_compile.runtime.batched.calls import cheap_first, oldest_first

KINDS = [Kind("full", ()) if step % 3 == 0 else Kind("cheap", step % 3) for step in range(12)]
COSTS = {"full": [6.0 + 2 * n for n in range(8)], "cheap": [1.0 + 0.1 * n for n in range(8)]}
ALONE = sum(COSTS[kind.variant][0] for kind in KINDS)


def test_one_request_takes_what_its_calls_cost() -> None:
    for policy in (first_request, oldest_first, cheap_first):
        assert simulate([5.0], KINDS, COSTS, policy, 8)["mean_ms"] == pytest.approx(ALONE)


def test_more_than_one_at_a_time_can_serve() -> None:
    arrivals = np.cumsum(np.random.default_rng(0).exponential(ALONE / 1.5, 300)).tolist()
    single = simulate(arrivals, KINDS, COSTS, first_request, 8)
    naive = simulate(arrivals, KINDS, COSTS, oldest_first, 8, join_any_time=False)
    shared = simulate(arrivals, KINDS, COSTS, cheap_first, 8)
    assert single["per_s"] == pytest.approx(1e3 / ALONE, rel=0.05)
    assert shared["per_s"] > 1.2 * single["per_s"]
    assert shared["mean_ms"] < naive["mean_ms"] < single["mean_ms"]


def test_offsets_even_out_the_rounds() -> None:
    costs = [6.0, 1.0, 1.0]
    assert phase_offsets(costs, 3) == [0, 1, 2]
    assert evenness(costs, [0, 1, 2]) == 1
    assert evenness(costs, phase_offsets(costs, 8)) < 1.2 < evenness(costs, [0] * 8)
