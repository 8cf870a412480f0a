"""docs/exact.md from what `benchmarks.exact` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.pages import markdown
from benchmarks.protocol import when

Rows = Iterable[tuple[object, ...]]
OURS = ("each", "moeca")  # contenders of compile_seconds.py
COMPILING = ("blocks", "", "torch.compile", "each block for itself", "equal blocks once")


def page(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    where = (
        f"{data['model']}, random weights; one thread of {machine['cores']} cores of {machine['processor']} "
        f"({machine['vectors']}), load "
        f"{machine['load_1min']} at the end; torch {machine['packages']['torch']}, {when(machine)}"
    )
    return f"""# The exact optimizations

What moeca does that changes no result, each by itself, and what a cache then gives end to end. Written by
`python -m benchmarks.exact --report` from [these figures](../benchmarks/results/exact.json): {where}. What
the passes do: [running](running.md).{_note(data)}

## Everything computed, one step

{_timings(data["computed"], "torch.compile, as shipped")}

## One step that forecasts every region

{_timings(data["reused"], "nothing hoisted")}

## Whole runs

50 steps, order 1, told their timesteps (`moeca.trajectory(model, timesteps=...)`). The trajectories walk side by side,
a step of each in turn; seconds are the sums of their steps. MACs are those of the programs that ran.

{markdown(("", "seconds", "speedup", "share of the MACs", "speedup x share"), _runs(data), left=None)}

## Compiling

Seconds from the prepared model to its first result, all variants of `uniform:3`, each in a new process; means of two,
the contenders in turn; in brackets the share of torch.compile's. On a *new machine* all of Inductor's caches are empty,
the header that every C++ kernel includes among them: it is compiled once for a machine's torch. moeca has it compiled,
and asks for vector instructions, while it captures.

{markdown(COMPILING, _compiling(data["compile_seconds"]), left=None)}

## What was asked

{markdown(("", "bound", "measured", ""), _targets(data["targets"]), left=None)}
"""


def _note(data: Mapping[str, Any]) -> str:
    """What must be known of a record that is older than the code; a whole new one has none."""
    return f"\n\n{data['note']}" if "note" in data else ""


def _timings(timings: Mapping[str, Any], baseline: str) -> str:
    head = ("", "median ms", "least", "most", f"times {baseline}")
    return markdown(
        head,
        (
            (name, f"{one['median_ms']:.1f}", f"{one['min_ms']:.1f}", f"{one['max_ms']:.1f}", f"{one['speedup']:.2f}")
            for name, one in timings.items()
        ),
        left=None,
    )


def _runs(data: Mapping[str, Any]) -> Rows:
    for name, one in data["runs"].items():
        seconds, speedup, share = one["median_ms"] / 1e3, one["speedup"], data["mac_fraction"].get(name)
        shares = ("-", "-") if share is None else (f"{share:.1%}", f"{speedup * share:.2f}")
        yield name, f"{seconds:.1f}", f"{speedup:.2f}", *shares


def _compiling(costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Rows:
    """With what they are of torch.compile's, in brackets."""
    for kind, seconds in costs.items():
        for depth, plain in seconds["plain"].items():
            ours = [f"{one:.0f} ({one / plain:.2f})" if (one := _of(seconds, name, depth)) else "-" for name in OURS]
            yield depth, kind, f"{plain:.0f}", *ours


def _of(seconds: Mapping[str, Mapping[str, float]], name: str, depth: str) -> float | None:
    return seconds.get(name, {}).get(depth)


def _targets(targets: Mapping[str, Any]) -> Rows:
    for name, one in targets.items():
        yield name, one["bound"], f"{one['measured']:.3f}", "met" if one["met"] else "missed"
