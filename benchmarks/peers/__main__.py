"""Peers and moeca on the trained digits DiT-MoE: speed, cost and quality of each contender over its knob.

    python -m benchmarks.peers            # about 40 minutes on one core; goes on from results/peers.json
    python -m benchmarks.peers --again "moeca calibrated"    # one heat anew
    python -m benchmarks.peers --report   # docs/benchmarks.md, docs/peers.svg and the README's table from the results
    python -m benchmarks.peers --quick    # few digits and steps: does it run?

Needs cache-dit, diffusers and scikit-image: pip install -e '.[bench]'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.peers import report, roster, solvers
from benchmarks.peers.measure import Truth, heat
from benchmarks.peers.way import Family
from benchmarks.peers.workload import QUICK, WHOLE, Size, batches, guided, prepared, shipped
from benchmarks.protocol import RESULTS, arguments, folder_of, machine, pin_threads, save
from examples import digits

WORK = Path("build/peers")


def truth_of(size: Size, console: Console) -> Truth:
    """Drawn now, or before by the same weights: kept in `WORK`."""
    drawn = batches(size)
    key = hashlib.sha256(digits.MODEL_FILE.read_bytes() + repr(size).encode()).hexdigest()[:16]
    file = WORK / f"truth-{key}.pt"
    if not file.exists():
        console.print("uncached and converged digits", style="dim")
        plain, exact = shipped(), prepared()
        uncached = [solvers.euler(guided(plain, batch), batch.noise, size.steps) for batch in drawn]
        converged = [solvers.adams_bashforth(guided(exact, batch), batch.noise, size.converged) for batch in drawn]
        WORK.mkdir(parents=True, exist_ok=True)
        torch.save((torch.cat(uncached), torch.cat(converged)), file)
    return Truth(drawn, *torch.load(file))


def measure(
    heats: Mapping[str, Sequence[Family]],
    size: Size,
    kept: dict[str, Any],
    remarks: list[str],
    console: Console,
    out: Path | None,
) -> dict[str, Any]:
    """All heats that `kept` lacks; written after each one. remarks: by hand, on how what is kept was measured."""
    found = {name: kept[name] for name in heats if name in kept}
    todo = [name for name in heats if name not in found]
    truth = truth_of(size, console) if todo else None
    for name in todo:
        console.print(name, style="bold")
        assert truth is not None
        found[name] = heat(heats[name], size, truth, lambda text: console.print(f"  {text}", style="dim"))
        found[name]["date"] = machine()["date"]
        if out:
            ordered = {one: found[one] for one in heats if one in found}
            payload = {"model": report.MODEL, "size": asdict(size), "remarks": remarks, "heats": ordered}
            save("peers", payload, out)
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments("Measure moeca beside its peers.", "few digits and steps")
    parser.add_argument("--report", action="store_true", help="write the pages from the results, measure nothing")
    parser.add_argument("--again", nargs="*", default=[], metavar="HEAT", help="measure these heats anew")
    args = parser.parse_args(argv)
    heats = roster.quick() if args.quick else roster.heats()
    if unknown := set(args.again) - set(heats):
        parser.error(f"no heat is named {', '.join(sorted(unknown))}; there are: {', '.join(heats)}")
    console = Console(width=140)
    out = folder_of(args)
    if args.report:
        for page in report.write(json.loads(((out or RESULTS) / "peers.json").read_text())):
            console.print(f"written: {page}")
        return
    pin_threads()
    file = None if out is None else out / "peers.json"
    before = json.loads(file.read_text()) if file and file.exists() else {"heats": {}}
    kept = {name: one for name, one in before["heats"].items() if name not in args.again}
    size = QUICK if args.quick else WHOLE
    found = measure(heats, size, kept, before.get("remarks", []) if kept else [], console, out)
    console.print(Markdown(report.summary({"heats": found})))


if __name__ == "__main__":
    main()
