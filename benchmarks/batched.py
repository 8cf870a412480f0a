"""Requests that come at random and share calls of the digits bundle, against one at a time and naive batching.

    python -m benchmarks.batched            # minutes; writes results/batched.json
    python -m benchmarks.batched --quick    # does it run?
    python -m benchmarks.batched --twin     # the compiled torch model alone; writes results/batched_twin.json

Measured: the throughput of 8 concurrent requests of 50 steps, against one at a time, in turns in one process and one
thread, bit for bit the same images. Simulated, from measured costs of a call and with the package's own choice of
calls: throughput and latency of Poisson arrivals. The loads are shares of what one at a time can serve.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Generator, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.protocol import arguments, folder_of, pin_threads, save
from moeca_compile.runtime.batched.calls import Policy, Waiting, cheap_first, oldest_first
from moeca_compile.runtime.batched.requests import Sampler
from moeca_compile.runtime.batched.session import BatchedSession
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.trajectory import state_layout

SCHEDULE = "uniform:3"
CONCURRENT, STEPS, ROUNDS = 8, 50, 5
BUDGET = 64 * 2**20
LOADS = (0.5, 0.9, 1.3, 1.7)
ARRIVALS = 2000


def sampler(seed: int, steps: int) -> Generator[dict[str, Any], dict[str, Any], Any]:
    """One digit by Euler's method, without guidance."""
    x, y = np.random.default_rng(seed).standard_normal((1, 1, 16, 16), dtype=np.float32), np.array([seed % 10])
    for now, after in itertools.pairwise(np.linspace(1, 0, steps + 1)):
        outputs = yield {"x": x, "t": np.array([1000 * now], np.float32), "y": y}
        x = x + np.float32(after - now) * outputs["output"]
    return x


def one_at_a_time(session: Session, request: Sampler) -> Any:
    """What a request gets in a trajectory of its own."""
    with session.trajectory() as trajectory:
        try:
            inputs = next(request)
            while True:
                inputs = request.send(trajectory.run(inputs))
        except StopIteration as end:
            return end.value


def throughput(session: Session, steps: int, rounds: int) -> dict[str, Any]:
    """Requests a second, medians of rounds that take turns; and whether the images are the same bit for bit."""
    batched = BatchedSession(session, BUDGET, CONCURRENT)
    single, shared, same = [], [], True
    for _ in range(rounds):
        begin = time.perf_counter()
        images = [one_at_a_time(session, sampler(seed, steps)) for seed in range(CONCURRENT)]
        middle = time.perf_counter()
        requests = [batched.submit(sampler(seed, steps), steps) for seed in range(CONCURRENT)]
        batched.run()
        end = time.perf_counter()
        single.append(CONCURRENT / (middle - begin))
        shared.append(CONCURRENT / (end - middle))
        same &= all(request.result().tobytes() == x.tobytes() for request, x in zip(requests, images, strict=True))
    return {
        "one_at_a_time_per_s": statistics.median(single),
        "batched_per_s": statistics.median(shared),
        "speedup": statistics.median(b / a for a, b in zip(single, shared, strict=True)),
        "speedups": sorted(b / a for a, b in zip(single, shared, strict=True)),
        "bitwise_equal": same,
        "pool_bytes": batched.pool.bytes,
        "budget_bytes": BUDGET,
    }


class Kind(NamedTuple):
    """What one step runs: steps with equal kinds can share a call."""

    variant: str
    coefficients: Hashable


def kinds_of(session: Session, steps: int) -> list[Kind]:
    """What each step of a request runs, by the package's own step rule."""
    state, kinds = StreamState(state_layout(session.manifest, 1), session.manifest.regions), []
    for step in range(steps):
        row, _ = session.driver.choose(state, step, None)
        spec = session.variant_of(row).spec
        kinds.append(Kind(spec.name, tuple(session.driver.coefficients(state, step)) if spec.coefficients else ()))
        writes = [int(name.removeprefix("state_")) for name in spec.writes]
        session.driver.keep(state, step, row, writes, [0] * len(writes))
    return kinds


def costs_of(session: Session, steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each variant, by number of samples from 1 on, with all that is around it."""
    costs: dict[str, list[float]] = {}
    for samples in range(1, CONCURRENT + 1):
        batched = BatchedSession(session, BUDGET, CONCURRENT, exact=False)
        times: dict[str, list[float]] = {}
        for seed in range(rounds):
            requests = [batched.submit(sampler(seed + n, steps), steps) for n in range(samples)]
            begin = time.perf_counter()
            while batched.step():
                times.setdefault(batched.calls[-1].variant, []).append((time.perf_counter() - begin) * 1e3)
                begin = time.perf_counter()
            assert all(request.done for request in requests)
        for variant, every in times.items():
            costs.setdefault(variant, []).append(statistics.median(every))
    return costs


def first_request(waiting: Sequence[Waiting], most: int) -> list[int]:
    """One request at a time, to its end: what serves one request after another does."""
    return [0]


def simulate(
    arrivals: Sequence[float], kinds: Sequence[Kind], costs: dict[str, list[float]], policy: Policy, most: int,
    join_any_time: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Serve requests that come at these milliseconds.

    Args:
        arrivals: rising.
        kinds: of the steps of each request.
        costs: milliseconds of a call, by variant and number of samples.
        policy: chooses the steps of each call.
        most: requests at a time.
        join_any_time: False: nobody joins before all who are being served have ended (naive batching).

    Returns:
        Requests a second; latency in ms: mean, and of 95 % at most.
    """
    now, coming, latencies = 0.0, list(enumerate(arrivals)), []
    steps: dict[int, int] = {}  # by request that is being served, how many steps it made
    since: list[int] = []  # their order: those whose step waits for longest first
    passed: dict[int, int] = {}
    coming.reverse()
    while coming or since:
        if not since and coming[-1][1] > now:
            now = coming[-1][1]
        if join_any_time or not since:
            while coming and coming[-1][1] <= now and len(since) < most:
                number, _ = coming.pop()
                steps[number] = passed[number] = 0
                since.append(number)
        waiting = [Waiting(kinds[steps[n]], costs[kinds[steps[n]].variant][0], 1, passed[n]) for n in since]
        chosen = [since[place] for place in policy(waiting, most)]
        now += costs[kinds[steps[chosen[0]]].variant][len(chosen) - 1]
        for number in since:
            passed[number] += 1
        for number in chosen:
            steps[number] += 1
            passed[number] = 0
            place = since.index(number)
            since.pop(place)
            if steps[number] == len(kinds):
                latencies.append(now - arrivals[number])
            elif policy is first_request:
                since.insert(0, number)
            else:
                since.append(number)
    return {
        "per_s": 1e3 * len(arrivals) / now,
        "mean_ms": statistics.fmean(latencies),
        "p95_ms": float(np.quantile(latencies, 0.95)),
    }


def twin_sampler(seed: int, steps: int) -> Generator[Any, Any, Any]:
    """The same digit for a compiled torch model."""
    import torch

    loop = sampler(seed, steps)
    inputs = next(loop)
    while True:
        output = yield tuple(torch.from_numpy(inputs[name]) for name in "xty")
        try:
            inputs = loop.send({"output": output.numpy()})
        except StopIteration as end:
            return end.value


def twin(steps: int, rounds: int, inner: str) -> dict[str, Any]:
    """Requests a second of a compiled torch model: a trajectory each, one after another, against a `BatchedModel`.

    The images of a request are the same bit for bit with and without other requests; those of a call of one sample
    differ by rounding, and `largest_difference` tells by how much.
    """
    import torch

    import moeca_compile as moeca
    from examples import digits

    inputs = digits.initial_noise(seed=0, n=2), torch.full((2,), 1000.0), digits.labels_of(2)
    model = moeca.compile(digits.load_model(), schedule=SCHEDULE, inner=inner)
    batched = moeca.BatchedModel(model, inputs, BUDGET, CONCURRENT)

    def alone(seed: int) -> Any:
        loop = twin_sampler(seed, steps)
        with torch.no_grad(), moeca.trajectory(model, stream="one"):
            inputs = next(loop)
            while True:
                try:
                    inputs = loop.send(model(*inputs))
                except StopIteration as end:
                    return end.value

    def together(seeds: Sequence[int]) -> list[Any]:
        requests = [batched.submit(twin_sampler(seed, steps), steps) for seed in seeds]
        batched.run()
        return [request.result() for request in requests]

    expected, seeds = [together([seed])[0] for seed in range(CONCURRENT)], range(CONCURRENT)
    singles, ratios, same, difference = [], [], True, 0.0
    for _ in range(rounds + 1):  # the first warms up
        begin = time.perf_counter(), time.process_time()
        images = [alone(seed) for seed in seeds]
        middle = time.perf_counter(), time.process_time()
        shared = together(seeds)
        end = time.perf_counter(), time.process_time()
        singles.append(CONCURRENT / (middle[0] - begin[0]))
        ratios.append(tuple((m - b) / (e - m) for b, m, e in zip(begin, middle, end, strict=True)))
        same &= all(x.tobytes() == y.tobytes() for x, y in zip(shared, expected, strict=True))
        difference = max(difference, *(float(np.abs(x - y).max()) for x, y in zip(shared, images, strict=True)))
    wall, processor = (sorted(ratio) for ratio in zip(*ratios[1:], strict=True))
    return {
        "schedule": SCHEDULE, "steps": steps, "concurrent": CONCURRENT, "inner": inner, "batches": batched.batches,
        "one_at_a_time_per_s": statistics.median(singles[1:]),
        "speedup": statistics.median(wall), "speedups": wall,
        "speedup_of_processor_time": statistics.median(processor), "speedups_of_processor_time": processor,
        "bitwise_equal": same, "largest_difference": difference,
        "pool_bytes": batched.pool.bytes, "budget_bytes": BUDGET,
    }  # fmt: skip


def phase_offsets(costs: Sequence[float], requests: int) -> list[int]:
    """When each request begins, in rounds, so that the rounds cost about the same.

    A round advances every request by one step. One after the other, a request gets the offset at which the most
    expensive round of the repeated schedule stays cheapest.

    Args:
        costs: of the steps of one period of the schedule, in any unit.
        requests: how many run at a time.
    """
    period = len(costs)
    load, offsets = [0.0] * period, []
    for _ in range(requests):
        after = [[load[r] + costs[(r - offset) % period] for r in range(period)] for offset in range(period)]
        best = min(range(period), key=lambda offset: (max(after[offset]), offset))
        load = after[best]
        offsets.append(best)
    return offsets


def evenness(costs: Sequence[float], offsets: Sequence[int]) -> float:
    """The most expensive round over the mean one: 1 is even."""
    period = len(costs)
    load = [sum(costs[(r - offset) % period] for offset in offsets) for r in range(period)]
    return max(load) / statistics.fmean(load)


def arriving(session: Session, steps: int, rounds: int, count: int) -> dict[str, Any]:
    """The simulation at each load."""
    kinds, costs = kinds_of(session, steps), costs_of(session, steps, rounds)
    alone_ms = sum(costs[kind.variant][0] for kind in kinds)
    ways: dict[str, tuple[Policy, bool]] = {
        "one at a time": (first_request, True),
        "naive batches": (oldest_first, False),
        "oldest first": (oldest_first, True),
        "cheap first": (cheap_first, True),
    }
    loads: dict[str, Any] = {}
    for load in LOADS:
        gaps = np.random.default_rng(0).exponential(alone_ms / load, count)
        arrivals = np.cumsum(gaps).tolist()
        loads[f"{load:g}"] = {
            name: simulate(arrivals, kinds, costs, policy, CONCURRENT, joins) for name, (policy, joins) in ways.items()
        }
    period = [costs[kind.variant][0] for kind in kinds[3:6]]
    offsets = phase_offsets(period, CONCURRENT)
    phases = {
        "offsets": offsets,
        "peak_over_mean": evenness(period, offsets),
        "peak_over_mean_in_step": evenness(period, [0] * CONCURRENT),
    }
    return {"call_ms": costs, "alone_ms": alone_ms, "arrivals": count, "loads": loads, "phases": phases}


def bundle_in(folder: Path) -> Session:
    import torch

    import moeca_compile as moeca
    from examples import digits

    inputs = digits.initial_noise(seed=0, n=2), torch.full((2,), 1000.0), digits.labels_of(2)
    moeca.export(digits.load_model(), inputs, SCHEDULE, folder / "digits.moeca")
    return Session.open(folder / "digits.moeca", threads=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure requests that share the calls of a bundle.", "8 steps, one round, 50 arrivals")
    parser.add_argument("--twin", action="store_true", help="the compiled torch model alone")
    args = parser.parse_args(argv)
    pin_threads()
    steps, rounds, count = (8, 1, 50) if args.quick else (STEPS, ROUNDS, ARRIVALS)
    if args.twin:
        payload: dict[str, Any] = twin(steps, rounds, "eager" if args.quick else "inductor")
        print(json.dumps(payload, indent=1))
        if out := folder_of(args):
            print(f"written: {save('batched_twin', payload, out).name}")
        return
    with tempfile.TemporaryDirectory() as folder:
        session = bundle_in(Path(folder))
        payload = {"schedule": SCHEDULE, "steps": steps, "concurrent": CONCURRENT}
        payload["measured"] = throughput(session, steps, rounds)
        payload["simulated"] = arriving(session, steps, max(1, rounds // 2), count)
    print(json.dumps(payload, indent=1))
    if out := folder_of(args):
        print(f"written: {save('batched', payload, out).name}")


if __name__ == "__main__":
    main()
