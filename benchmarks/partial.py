"""What a PARTIAL row costs, compiled: blocks of DiT-MoE-S/2-8E2A, every kind of row in turn, as a share of a full step.

    python -m benchmarks.partial            # four blocks, about 6 minutes on one core; writes results/partial.json
    python -m benchmarks.partial --quick    # one block, few rounds: does it run?

The bound for a row is (rho + tau) x full + 10 % of full. The experts' weights are packed, which few rows an expert need
most. A full step here also writes what the partial ones read; what that costs is shown against a model compiled without
a cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

import moeca_compile as moeca
from benchmarks import models
from benchmarks.protocol import Timing, arguments, as_json, folder_of, pin_threads, print_table, save
from moeca_compile.schedule import Act, Action, Partial, Schedule

FULL, UNCACHED = "full", "moeca, full, no state"
C, F = Action.COMPUTE, Action.FORECAST
KINDS: dict[str, tuple[Act, Act]] = {  # attention, experts
    FULL: (C, C),
    "tau 0": (F, Partial(0, 0)),
    "tau 0.05": (F, Partial(0, 0.05)),
    "rho 0.25": (Partial(0.25), Partial(0.25)),
    "rho 0.25, tau 0.1": (Partial(0.25, 0.1), Partial(0.25, 0.1)),
}


def bound(kind: str) -> float:
    """The share of a full step that the row may cost."""
    act = KINDS[kind][1]
    return act.rho + act.tau + 0.1 if isinstance(act, Partial) else 1.0


def schedule(depth: int) -> Schedule:
    """All kinds of row in turn, for ever."""
    rows = tuple(kind * depth for kind in KINDS.values())
    keys = tuple(f"blocks.{i}.{part}" for i in range(depth) for part in ("attn", "moe"))
    return Schedule(rows, keys, period=len(rows), made_by="every kind of row")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure what PARTIAL rows cost.", "one block, few rounds")
    args = parser.parse_args(argv)
    depth, rounds = (1, 2) if args.quick else (4, 10)
    pin_threads()
    network = models.network(depth)
    inputs = models.example_inputs()
    plain = moeca.compile(network, schedule="full", pack_experts=True)
    moeca.warmup(plain, *inputs)
    cached = moeca.compile(network, schedule=schedule(depth), pack_experts=True)
    begin = time.perf_counter()
    moeca.warmup(cached, *inputs)
    seconds = time.perf_counter() - begin
    timings, shares = measure(cached, plain, rounds)
    print_table(f"one step, {models.CONFIG}, {depth} blocks, batch {models.BATCH}", timings, baseline=FULL)
    verdict = {}
    for kind in (one for one in KINDS if one != FULL):
        verdict[kind] = {"share": 1 / timings[kind].speedup(timings[FULL]), "bound": bound(kind), "macs": shares[kind]}
        print(f"{kind}: {verdict[kind]['share']:.3f} of full, bound {bound(kind):.2f}, MACs {shares[kind]:.3f}")
    state = moeca.stats(cached).state_bytes
    print(f"state {state / 1e6:.1f} MB; compiling {len(KINDS)} variants took {seconds:.0f} s")
    out = folder_of(args)
    if out:
        payload = {
            "model": f"DiT-MoE-{models.CONFIG}, {depth} blocks, 256 tokens, batch {models.BATCH}, float32",
            "one_step": as_json(timings, baseline=FULL),
            "rows": verdict,
            "state_bytes": state,
            "compile_seconds": seconds,
        }
        print(f"written: {save('partial', payload, out).name}")


def measure(cached: models.Model, plain: models.Model, rounds: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Milliseconds of each kind of row, one round after the other, and its share of the MACs."""
    walker = models.Walker(cached, Schedule.full())
    samples: dict[str, list[float]] = {name: [] for name in (*KINDS, UNCACHED)}
    for number in range(-2, rounds):
        for name in KINDS:
            begin = time.perf_counter()
            walker.step()
            samples[name] += [1000 * (time.perf_counter() - begin)] * (number >= 0)
        begin = time.perf_counter()
        plain(*models.example_inputs())
        samples[UNCACHED] += [1000 * (time.perf_counter() - begin)] * (number >= 0)
    last = moeca.stats(cached).steps[-len(KINDS) :]
    macs = {name: step.macs / last[0].macs for name, step in zip(KINDS, last, strict=True)}
    return {name: Timing(tuple(values)) for name, values in samples.items()}, macs


if __name__ == "__main__":
    main()
