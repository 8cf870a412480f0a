"""The page's sections on models with random weights: seconds, MACs and bytes; of quality nothing can be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.pages import markdown
from benchmarks.peers import plain
from benchmarks.peers.tables import UNCACHED, spread
from benchmarks.peers.verdict import Point, points_of
from benchmarks.protocol import when

Payload = Mapping[str, Any]

TITLES = {"hidream": "HiDream's structure", "s2": "DiT-MoE-S/2"}  # by workload, in the order of the page
INTRO = """
# Larger models, random weights

Speed only: with random weights no figure of quality means anything, and the relative L2 to the uncached run is here to
show that something was computed. The same protocol and contenders; the baseline is `torch.compile` of the prepared
model, *over eager* is over the model as shipped. Compile seconds began with Inductor's caches on disk empty; settings
after a contender's first found there what they share with it. DBCache's thresholds are far above its default: on
random models it doesn't hit below. The state that moeca keeps is told by `moeca.explain`, which runs no step: a run
whose bytes differ from that is refused. What is beyond it in *state MB* is hoisted values.
"""

HEAD = (
    "", "seconds", "speedup (by round)", "over eager", "MACs", "state MB", "told before the run, MB",
    "compile seconds", "graphs", "breaks", "rel. L2",
)  # fmt: skip


def sections(payloads: Mapping[str, Payload]) -> str:
    """What docs/benchmarks.md says of the models with random weights; nothing where none was measured."""
    parts = [f"\n## {title}\n\n{section(payloads[one])}\n" for one, title in TITLES.items() if one in payloads]
    return "".join([INTRO, *parts]) if parts else ""


def section(payload: Payload) -> str:
    """One workload's."""
    size, heats = payload["size"], payload["heats"].values()
    loads = [load for heat in heats for load in heat["load_1min"]]
    machine = payload.get("machine")
    told = f"`{machine['command']}`, {when(machine)}; " if machine else ""
    return f"""{payload["model"]};
{size["steps"]} Euler steps with guidance, {2 * size["digits"]} samples a call, float32.
{told}load {min(loads):.1f} to {max(loads):.1f}, the median of {size["rounds"]} rounds.

{table(payload)}

{verdict(points_of(payload))}
{_remarks(payload)}
Not here, and why:

{_left_out(payload)}"""


def table(payload: Payload) -> str:
    points = points_of(payload)
    eager = next(point["speedup"] for point in points if point["family"] == UNCACHED)
    facts = {name: one for heat in payload["heats"].values() for name, one in heat["families"].items()}
    rows, seen = [], set()
    for point in points:
        first = point["family"] not in seen
        seen.add(point["family"])
        family = facts[point["family"]]
        rows.append(
            [
                f"{point['family']}{', ' if point['setting'] else ''}{point['setting']}",
                f"{point['seconds']:.2f}",
                f"{point['speedup']:.2f} ({spread(point)})",
                f"{point['speedup'] / eager:.2f}",
                f"{point['macs']:.1%}",
                f"{point['state_bytes'] / 1e6:.2f}",
                f"{point['told_bytes'] / 1e6:.2f}" if "told_bytes" in point else "-",
                "-" if point["compile_seconds"] is None else f"{point['compile_seconds']:.1f}",
                f"{family['graphs']}" if first else "",
                f"{family['graph_breaks']}" if first else "",
                f"{point['relative_l2']:.2g}",
            ]
        )
    return markdown(HEAD, rows)


def verdict(points: list[Point]) -> str:
    """What moeca makes of its MACs: 1 is a run whose time falls as its multiply-accumulates do."""
    text = f"Speedup over `{plain.BASELINE}` x share of the MACs, moeca uniform: {_products(points, 'moeca uniform')}."
    if steps := _products(points, "fewer steps"):
        text += f" Fewer steps, where it is 1 but for the noise: {steps}."
    return text


def _products(points: list[Point], family: str) -> str:
    own = [point for point in points if point["family"].startswith(family) and "onnxruntime" not in point["family"]]
    return ", ".join(f"{point['setting']} {point['speedup'] * point['macs']:.2f}" for point in own)


def _remarks(payload: Payload) -> str:
    return "".join(f"\n{one}\n" for one in payload.get("remarks", ()))


def _left_out(payload: Payload) -> str:
    return "\n".join(f"- {name}: {reason.rstrip('.')}." for name, reason in payload["left_out"].items())
