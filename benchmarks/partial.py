"""What a PARTIAL row costs, compiled: blocks of DiT-MoE-S/2-8E2A, every kind of row in turn, as a share of a full step.

    python -m benchmarks.partial            # four blocks, about 6 minutes on one core; writes results/partial.json
    python -m benchmarks.partial --narrow   # the trained digits models, 32 samples; writes results/partial_narrow.json
    python -m benchmarks.partial --narrow --few DSMoE   # one of them, tau 0 and 0.05 alone; writes partial_DSMoE.json
    python -m benchmarks.partial --narrow --short   # both, the rows that matter most for the table at equal time, not
                                                    # written out: some minutes; writes partial_short.json
    python -m benchmarks.partial --glyphs   # the glyphs model, time and PSNR of each row; writes partial_glyphs.json
    python -m benchmarks.partial --kept     # PSNR with branches kept in bfloat16; writes results/partial_kept.json
    python -m benchmarks.partial --quick    # one block, few rounds: does it run?

The bound for a row is (rho + tau) x full + 10 % of full. The experts' weights are packed, which few rows an expert need
most. A full step here also writes what the partial ones read; what that costs is shown against a model compiled without
a cache.

Of the digits models the experts are told apart: what a row takes beyond one that forecasts whole regions, over what the
experts of a full step take (a full step less one that computes attention and forecasts the experts). Times are those of
the processor, on one thread. Some rows are measured in the written-out form too, which GPUs and the interpreter run,
and with `--few` branches that are kept in bfloat16.
*Equal time*: a full step and three steps of one row, over four full steps that keep no branches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

import moeca_compile as moeca
from benchmarks import models
from benchmarks.paired import interval, psnr
from benchmarks.policies_jobs import BLOCKS, KEYS, STEPS, Idea, uniform, with_idea
from benchmarks.protocol import Timing, arguments, as_json, folder_of, pin_threads, print_table, save
from benchmarks.tasks import DIGITS as OF_DIGITS
from benchmarks.tasks import GLYPHS, Task
from examples import digits, dsmoe
from moeca_compile.passes.partial import branches_in_place
from moeca_compile.schedule import Act, Action, Control, Partial, Schedule

FULL, UNCACHED = "full", "moeca, full, no state"
C, F = Action.COMPUTE, Action.FORECAST
NARROW: dict[str, tuple[Act, Act]] = {
    FULL: (C, C),
    "tau 0": (F, Partial(0, 0)),
    "tau 0.02": (F, Partial(0, 0.02)),
    "tau 0.04": (F, Partial(0, 0.04)),
    "tau 0.05": (F, Partial(0, 0.05)),
    "tau 0.1": (F, Partial(0, 0.1)),
    "attention computed, tau 0.04": (C, Partial(0, 0.04)),
}
WHOLE: dict[str, tuple[Act, Act]] = {
    "whole full": (C, C),
    "whole forecast": (F, F),
    "whole, attention computed": (C, F),
}
WRITTEN_OUT: dict[str, tuple[Act, Act]] = {
    "written out, full": (C, C),
    "written out, tau 0": (F, Partial(0, 0)),
    "written out, tau 0.05": (F, Partial(0, 0.05)),
}
FEW = (FULL, "tau 0", "tau 0.05")
IN_16_BITS = ", in bfloat16"
SHORT = (FULL, "tau 0", "tau 0.04", "attention computed, tau 0.04")
NARROW_BATCH = 32
DIGITS: dict[str, Callable[[], torch.nn.Module]] = {"DiT-MoE": digits.load_model, "DSMoE": dsmoe.load_digits}
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
    parser.add_argument("--narrow", action="store_true", help="the trained digits models, 96 channels wide")
    parser.add_argument("--short", action="store_true", help="of --narrow few rows, and no written-out form")
    parser.add_argument("--kept", action="store_true", help="PSNR of the digits models, kept exactly and in bfloat16")
    parser.add_argument("--glyphs", action="store_true", help="time and PSNR of the glyphs model's rows")
    parser.add_argument("--few", choices=list(DIGITS), help="of one digits model the rows tau 0 and tau 0.05 alone")
    args = parser.parse_args(argv)
    depth, rounds = (1, 2) if args.quick else (4, 10)
    pin_threads()
    if args.kept:
        main_kept(folder_of(args))
        return
    if args.glyphs:
        main_glyphs(2 if args.quick else 10, 2 if args.quick else NARROW_BATCH, folder_of(args))
        return
    if args.narrow:
        main_narrow(2 if args.quick else 10 if args.short else 20, folder_of(args), args.few, args.short)
        return
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


def main_narrow(rounds: int, out: Path | None, few: str | None = None, short: bool = False) -> None:
    """The digits models: each kind of row's time, its share of the experts' time, and a schedule's share of all time.
    `few`: of this one, the rows of `FEW`; `short`: those of `SHORT`; it leaves out the written-out form."""
    payload = {}
    kinds_alone = FEW if few else SHORT if short else tuple(NARROW)
    for name, load in DIGITS.items():
        if few not in (None, name):
            continue
        timings = measure_narrow(load().requires_grad_(False), rounds, kinds_alone, not short, few is not None)
        print_table(f"one step, {name}, {NARROW_BATCH} samples", timings, baseline=FULL)
        kinds = [kind for kind in timings if "tau" in kind and "attention" not in kind]
        figures = {kind: over_experts(timings, kind) for kind in kinds}
        for kind, (low, middle, high) in figures.items():
            print(f"{name}, {kind}: {middle:.3f} of the experts' time (quartiles {low:.3f} to {high:.3f})")
        shares = equal_time(timings)
        for kind, share in shares.items():
            print(f"{name}, uniform:4, between full steps {kind}: {100 * share:.0f} % of the time of full steps")
        payload[name] = {
            "one_step": as_json(timings, baseline=FULL),
            "of_the_experts_time": figures,
            "uniform_4_of_full_time": shares,
        }
    if out:
        file = "partial" + "_short" * short + (f"_{few}" if few else "" if short else "_narrow")
        print(f"written: {save(file, payload, out).name}")


def main_kept(out: Path | None) -> None:
    """PSNR to the uncached digits of rows that compute 4 % of the branches, by what the branches are kept in."""
    payload: dict[str, dict[str, float]] = {}
    idea = (Action.FORECAST, Partial(0, 0.04)) * (len(KEYS) // 2)
    for name, load in DIGITS.items():
        network = load().requires_grad_(False)
        uncached = digits.sample(network, seed=5000, n=NARROW_BATCH, steps=STEPS)
        for every, kept in product((2, 4), ("exact", "bfloat16")):
            schedule = with_idea(uniform(every), Idea((idea,), Control(kept=kept)))
            handle = moeca.compile(network, schedule=schedule)
            with moeca.trajectory(handle, steps=STEPS):
                images = digits.sample(handle, seed=5000, n=NARROW_BATCH, steps=STEPS)
            quality = float(digits.psnr(images, uncached).mean())
            payload.setdefault(name, {})[f"uniform:{every}, {kept}"] = quality
            print(f"{name}, uniform:{every}, tau 0.04 between, {kept}: {quality:.2f} dB")
    if out:
        print(f"written: {save('partial_kept', payload, out).name}")


def main_glyphs(rounds: int, samples: int, out: Path | None) -> None:
    """Of the glyphs model at `uniform:4`, by the row between full steps: the share of the uncached time, and the PSNR
    to the uncached glyphs with its 95 % interval."""
    network = GLYPHS.load().requires_grad_(False)
    draw = GLYPHS.sampler(samples, STEPS)
    uncached = draw(network, 5000)
    rows = {kind: row for kind, row in {**WHOLE, **{kind: NARROW[kind] for kind in SHORT}}.items() if row != (C, C)}
    qualities = {}
    for kind, row in rows.items():
        handle = moeca.compile(GLYPHS.load(), schedule=with_idea(uniform(4), Idea((row * BLOCKS,))))
        with moeca.trajectory(handle, steps=STEPS):
            qualities[kind] = interval(psnr(draw(handle, 5000), uncached))
        print(f"{kind}: {qualities[kind][0]:.1f} ± {qualities[kind][1]:.1f} dB", flush=True)
    timings = measure_narrow(network, rounds, SHORT, written_out=False, task=GLYPHS)
    print_table(f"one step, glyphs, {NARROW_BATCH} samples", timings, baseline=FULL)
    shares = equal_time(timings)
    for kind, share in shares.items():
        print(f"glyphs, uniform:4, between full steps {kind}: {100 * share:.0f} % of the time of full steps")
    if out:
        payload = {
            "one_step": as_json(timings, baseline=FULL),
            "uniform_4_of_full_time": shares,
            "uniform_4_psnr_db": qualities,
            "samples": samples,
        }
        print(f"written: {save('partial_glyphs', payload, out).name}")


def equal_time(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Of each row what a full step and three steps of the row take, over four full steps of whole regions: medians."""
    full_of = {**dict.fromkeys(WHOLE, "whole full"), **dict.fromkeys(WRITTEN_OUT, "written out, full")}
    full_of |= {kind: FULL + IN_16_BITS for kind in timings if kind.endswith(IN_16_BITS)}
    return {
        kind: (timings[full_of.get(kind, FULL)].median + 3 * timing.median) / (4 * timings["whole full"].median)
        for kind, timing in timings.items()
        if not kind.removesuffix(IN_16_BITS).endswith("full")
    }


def measure_narrow(
    network: torch.nn.Module,
    rounds: int,
    rows_of: Sequence[str] = tuple(NARROW),
    written_out: bool = True,
    in_16_bits: bool = False,
    task: Task = OF_DIGITS,
) -> dict[str, Timing]:
    """Milliseconds of processor time of each kind of row, one round after the other. Rows of whole regions are another
    model's, which keeps no branches; all take the weights as they are. `rows_of`: which of `NARROW`; `written_out`:
    that form too; `in_16_bits`: the same rows too with branches that are kept in bfloat16; `task`: of the network."""
    inputs = task.noise(0, NARROW_BATCH), torch.full((NARROW_BATCH,), 1000.0), task.labels_of(0, NARROW_BATCH)
    keys = tuple(region.key for region in moeca.explain(network, *inputs).regions)
    samples: dict[str, list[float]] = {}
    handles = []
    kept = {kind: NARROW[kind] for kind in rows_of}
    narrow = {kind + IN_16_BITS: row for kind, row in kept.items()}
    for kinds in (kept, WHOLE, *([WRITTEN_OUT] if written_out else []), *([narrow] if in_16_bits else [])):
        control = Control(kept="bfloat16" if kinds is narrow else "exact")
        rows = tuple(kind * (len(keys) // 2) for kind in kinds.values())
        every_kind = Schedule(rows, keys, period=len(rows), control=control, made_by="every kind of row")
        library = nothing if kinds is WRITTEN_OUT else branches_in_place.library
        with patch.object(branches_in_place, "library", library):
            handle = moeca.compile(network, schedule=every_kind)
            moeca.warmup(handle, *inputs)
        handles.append((kinds, handle))
    times = inputs[1]
    for number in range(-2, rounds):
        for kinds, handle in handles:
            for kind in kinds:
                times = times * 0.999
                begin = time.process_time()
                handle(inputs[0], times, inputs[2])
                samples.setdefault(kind, []).extend([1000 * (time.process_time() - begin)] * (number >= 0))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def nothing() -> None:
    """In place of the kernels' library: there is none."""


def over_experts(timings: Mapping[str, Timing], kind: str) -> list[float]:
    """Quartiles over the rounds of what a row takes beyond one that forecasts whole regions, over the experts' time."""
    names = (kind, "whole forecast", "whole full", "whole, attention computed")
    rounds = zip(*(timings[name].ms for name in names), strict=True)
    return statistics.quantiles([(row - cheap) / (full - attention) for row, cheap, full, attention in rounds], n=4)


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
