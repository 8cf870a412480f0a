"""docs/gpu.md from results/gpu.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.protocol import when

BASELINE, GRAPHS = "torch.compile", ", CUDA graphs"
STEPS = 50
BANDWIDTH = 4.8e12  # bytes a second, of an H200 by its datasheet

INTRO = """<!-- Written by `python -m benchmarks.gpu --report` from benchmarks/results/gpu.json. -->
# Large models on a GPU

`python -m benchmarks.gpu` ([every figure](../benchmarks/results/gpu.json)): published configurations with random
weights, so speed only; bfloat16, 50 Euler steps, guidance in one call (two samples an image). The baseline is
`torch.compile` of the prepared model, as CUDA graphs `mode="reduce-overhead"`. Experts' weights lie side by side for
all contenders (`pack_experts`), and all run without Dynamo's guards once they are compiled. moeca's trajectories are
named, told their timesteps, and frozen; state at fixed addresses is copied into its slots, which is in the times.
*Interval N* is `uniform:N`, order 1. *x MACs* is the speedup over the baseline times the share of the
multiply-accumulates: what is short of 1 goes into reused steps, state and launches.
"""


def page(found: Mapping[str, Any]) -> str:
    recorded = f"\nRecorded {when(found['machine'])}.\n"
    return "\n".join(
        [INTRO + recorded, *(f"- {one}" for one in found["remarks"]), *_runs(found["runs"]), *_experts(found), ""]
    )


def _runs(runs: Mapping[str, Any]) -> Iterator[str]:
    for name, run in runs.items():
        machine, contenders = run["machine"], run["contenders"]
        baseline = BASELINE if BASELINE in contenders else f"{BASELINE}, CUDA graphs"
        rows = [_row(one, figures) for one, figures in contenders.items()]
        packages = machine["packages"]
        yield f"\n## {name}\n"
        yield (
            f"{machine['cuda']}, {machine['processor']}, Python {machine['python']}, torch {packages['torch']}, "
            f"{machine['date']}; {_rounds(contenders[baseline]['rounds'])}.\n"
        )
        head = ("", "ms a trajectory", f"over {baseline}", "MACs", "x MACs", "state MB", "peak GB")
        yield from _table(head, rows)
        yield from _steps(contenders)


def _rounds(rounds: int) -> str:
    return "one trajectory each" if rounds == 1 else f"medians of {rounds} trajectories, taken in turns"


def computed_and_reused(contenders: Mapping[str, Any]) -> tuple[float, float, int] | None:
    """Milliseconds of a computed and of a reused step, and bytes of state. By least squares over the intervals, as CUDA
    graphs where they ran so: a trajectory is so many computed steps and so many reused ones. None: one interval ran."""
    ending = GRAPHS if f"interval 2{GRAPHS}" in contenders else ""
    taken = {k: contenders[f"interval {k}{ending}"] for k in range(2, 6) if f"interval {k}{ending}" in contenders}
    if len(taken) < 2:
        return None
    counts = np.array([(-(-STEPS // k), STEPS - -(-STEPS // k)) for k in taken], dtype=float)
    computed, reused = np.linalg.lstsq(counts, [one["median_ms"] for one in taken.values()], rcond=None)[0]
    return float(computed), float(reused), int(next(iter(taken.values()))["state_bytes"])


def _steps(contenders: Mapping[str, Any]) -> Iterator[str]:
    found = computed_and_reused(contenders)
    if found is None:
        return
    ending = GRAPHS if f"interval 2{GRAPHS}" in contenders else ""
    computed, reused, state = found
    yield (
        f"\nOver the intervals{ending.replace(',', ' as')} a computed step takes {computed:.2f} ms and a "
        f"reused one {reused:.2f} ms, where reading its state once would take {state / BANDWIDTH * 1e3:.3f} ms at the "
        f"memory's {BANDWIDTH / 1e12} TB/s."
    )


def _row(name: str, figures: Mapping[str, Any]) -> list[str]:
    speedup, share = figures["speedup"], figures.get("mac_fraction")
    return [
        name,
        f"{figures['median_ms']:.1f} ({figures['min_ms']:.1f} to {figures['max_ms']:.1f})",
        f"{speedup:.2f}",
        "-" if share is None else f"{share:.1%}",
        "-" if share is None else f"{speedup * share:.2f}",
        f"{figures['state_bytes'] / 1e6:.0f}" if "state_bytes" in figures else "-",
        f"{figures['peak_bytes'] / 1e9:.1f}",
    ]


def _experts(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## One layer's experts alone\n"
    yield "Milliseconds of `moeca::experts`: with weights that are stacked at each call, and that lie side by side.\n"
    for model, times in found["experts_ms"].items():
        counts = dict.fromkeys(key.partition(",")[0] for key in times)
        rows = [
            [count, *(f"{times[f'{count}, {form}']:.3f}" for form in ("stacked", "side by side"))] for count in counts
        ]
        yield from _table((model, "stacked", "side by side"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
