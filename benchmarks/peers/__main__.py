"""Peers and moeca on one model: speed and cost of each contender over its knob, and quality on the trained digits.

    python -m benchmarks.peers                    # about 40 minutes on one core; goes on from results/peers.json
    python -m benchmarks.peers --again "moeca calibrated"    # one heat anew
    python -m benchmarks.peers --model hidream    # HiDream's structure, random: speed only, about 20 minutes
    python -m benchmarks.peers --model s2         # DiT-MoE-S/2, random: speed only, about 22 minutes
    python -m benchmarks.peers --report   # docs/benchmarks.md, docs/peers.svg and the README's table from the results
    python -m benchmarks.peers --quick    # few images and steps: does it run?

Needs cache-dit, diffusers and scikit-image: pip install -e '.[bench]'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.peers import refused, report, roster, speed
from benchmarks.peers.measure import heat
from benchmarks.peers.way import Family
from benchmarks.peers.workload import Workload
from benchmarks.peers.workloads import WORKLOADS, workload
from benchmarks.protocol import RESULTS, arguments, folder_of, machine, pin_threads, save


def measure(
    heats: Mapping[str, Sequence[Family]],
    work: Workload,
    kept: dict[str, Any],
    remarks: list[str],
    console: Console,
    out: Path | None,
) -> dict[str, Any]:
    """All heats that `kept` lacks; written after each one. remarks: by hand, on how what is kept was measured."""
    payload: dict[str, Any] = {"model": work.model, "size": asdict(work.size), "remarks": remarks}
    if work.speed_only:
        payload["left_out"] = refused.left_out(work)
    found = {name: kept[name] for name in heats if name in kept}
    todo = [name for name in heats if name not in found]
    if todo:
        console.print("what all are compared with", style="dim")
        truth = work.truth()
    for name in todo:
        console.print(name, style="bold")
        found[name] = heat(heats[name], work, truth, lambda text: console.print(f"  {text}", style="dim"))
        found[name]["date"] = machine()["date"]
        if out:
            save(work.result, {**payload, "heats": {one: found[one] for one in heats if one in found}}, out)
    return {**payload, "heats": found}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure moeca beside its peers.", "few images and steps")
    parser.add_argument("--model", choices=WORKLOADS, default="digits", help="what is measured (default digits)")
    parser.add_argument("--report", action="store_true", help="write the pages from the results, measure nothing")
    parser.add_argument("--again", nargs="*", default=[], metavar="HEAT", help="measure these heats anew")
    args = parser.parse_args(argv)
    work = workload(args.model, args.quick)
    heats = roster.heats(work, args.quick)
    if unknown := set(args.again) - set(heats):
        parser.error(f"no heat is named {', '.join(sorted(unknown))}; there are: {', '.join(heats)}")
    console = Console(width=140)
    out = folder_of(args)
    if args.report:
        for page in report.write(report.load(out or RESULTS)):
            console.print(f"written: {page}")
        return
    pin_threads()
    file = None if out is None else out / f"{work.result}.json"
    before = json.loads(file.read_text()) if file and file.exists() else {"heats": {}}
    kept = {name: one for name, one in before["heats"].items() if name not in args.again}
    found = measure(heats, work, kept, before.get("remarks", []) if kept else [], console, out)
    console.print(Markdown(speed.section(found) if work.speed_only else report.summary(found)))


if __name__ == "__main__":
    main()
