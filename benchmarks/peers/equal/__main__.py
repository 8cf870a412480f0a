"""Peers at equal evaluations of the network, each at its best: quality to both truths, paired with our schedules.

    python -m benchmarks.peers.equal            # about an hour on one core; writes results/peers_equal.json
    python -m benchmarks.peers.equal --only UniPC --held-out 2 --counts 17 10    # these contenders, on so many seeds of
                                                # 32 digits, at these evaluations; other peers' figures stay
    python -m benchmarks.peers.equal --as-before    # settings aren't chosen anew, but those of the committed result
    python -m benchmarks.peers.equal --task glyphs    # the glyphs model; writes results/peers_equal_glyphs.json
    python -m benchmarks.peers.equal --quick    # few digits: does it run?
    python -m benchmarks.peers.equal --report   # docs/peers.md from results/peers_equal.json and peers_latency.json;
                                                # with --task glyphs docs/peers-glyphs.md

Settings are chosen on seeds 0 to 15. Samples stay in `--work`, so that a stopped run goes on; our schedules and the
truths are those of `python -m benchmarks.fitted`, from its own folder. Quality doesn't depend on the machine's load; no
time is told here. Needs cache-dit and diffusers: pip install -e '.[bench]'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import fitted
from benchmarks.peers.equal import page, roster
from benchmarks.peers.equal.lab import Size
from benchmarks.peers.equal.measure import Bench, measure, settings_of
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS

WORK = Path("build/peers_equal")
WHOLE = Size(steps=50, finer=4, counts=(25, 17, 13, 10), seeds=16, each=2, held_out=8, batch=32)
QUICK = Size(steps=50, finer=2, counts=(10,), seeds=2, each=2, held_out=1, batch=4)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one number of evaluations, few digits")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"folder of finished samples; default {WORK}")
    parser.add_argument("--fitted", type=Path, help=f"the same of ours; default in {fitted.WORK}")
    parser.add_argument("--only", default="", help="contenders whose kind or name begins so; default all")
    parser.add_argument("--held-out", type=int, help="seeds that are drawn now; default all")
    parser.add_argument("--counts", type=int, nargs="+", help="evaluations that are drawn now; default all")
    parser.add_argument("--as-before", action="store_true", help="settings aren't chosen anew, but those of the result")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("peers_equal")
    if args.report:
        page.write(RESULTS, task)
        return
    pin_threads()
    size, of_ours = (QUICK, fitted.QUICK) if args.quick else (WHOLE, fitted.WHOLE)
    held_out = args.held_out or size.held_out
    size = replace(size, held_out=held_out, counts=tuple(args.counts or size.counts))
    work = args.work or Path(task.results_of(str(WORK)))
    ours = fitted.Bench(of_ours, args.fitted or fitted.WORK / task.name, task)
    console, out = Console(width=180), folder_of(args)
    before = json.loads((RESULTS / f"{name}.json").read_text()) if args.as_before else {"lines": ()}
    bench = Bench(size, work, ours, settings_of(before))
    chosen = [
        contender
        for contender in roster.contenders(task)
        if args.only in ("", contender.kind) or contender.name.startswith(args.only)
    ]
    file = None if out is None else out / f"{name}.json"
    known = json.loads(file.read_text()) if file is not None and file.exists() and (args.only or args.counts) else {}
    known.pop("machine", None)  # lines that stay tell their own run
    for result in measure(bench, chosen, known, console):
        if out is not None:
            save(name, result, out)


if __name__ == "__main__":
    main()
