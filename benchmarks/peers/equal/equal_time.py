"""The nearest peer at equal time: calibrated multistep with the steps that it computes while our schedules run.

    python -m benchmarks.peers.equal.equal_time                  # 20 minutes on one core; results/peers_equal_time.json
    python -m benchmarks.peers.equal.equal_time --task glyphs    # results/peers_equal_time_glyphs.json

At a cheap step it calls nothing, where we compute a weighted sum; at a full one it lacks our checks of the call. Both
are read off the task's results of `python -m benchmarks.peers.equal.latency`, and rounded to whole steps. Its steps and
weights are chosen as by `python -m benchmarks.peers.equal`, and it is paired with ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import fitted
from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.paired import interval, paired, psnr
from benchmarks.peers.equal.__main__ import WHOLE, WORK
from benchmarks.peers.equal.lab import Lab, batch_of
from benchmarks.peers.equal.latency import COUNT
from benchmarks.peers.equal.measure import BEST, Bench
from benchmarks.peers.equal.samplers import contenders
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS


def steps_in_our_time(timed: Mapping[str, Any], count: int, steps: int) -> float:
    """Full steps of calibrated multistep while our schedule computes `count` of `steps`.

    Args:
        timed: a result of `benchmarks.peers.equal.latency`.
        count: steps that our schedule computes.
        steps: of the sampler.
    """
    speedup = {point["family"]: float(point["speedup_of_processor_time"]) for point in timed["points"]}
    share = float(timed["cheap_steps"][0]["share"])  # of our full step
    whole = COUNT * speedup["calibrated multistep"] / speedup["moeca output, fitted"]
    full = whole / (COUNT + (steps - COUNT) * share)  # our full step over its own
    return full * (count + (steps - count) * share)


def measure(bench: Bench, timed: Mapping[str, Any], console: Console) -> list[dict[str, Any]]:
    """Leads of our schedules, each over the peer that is fitted to the same truth."""
    lines = []
    for count in bench.size.counts:
        exact = steps_in_our_time(timed, count, bench.size.steps)
        more = max(count, round(exact))
        ours = {more: bench.lab.computed[count]}
        lab = Lab(replace(bench.size, counts=(more,)), ours, bench.work, bench.fitted.task)
        for contender in contenders()[: len(BEST)]:
            setting, _ = lab.choose(contender, more)
            seeds = range(fitted.FIRST_SEED, fitted.FIRST_SEED + bench.size.held_out)
            images = [setting.draw(batch_of(bench.fitted.task, seed, bench.size.batch)) for seed in seeds]
            truth = bench.truths[contender.target]
            levels = psnr(torch.cat(images), truth)
            own = psnr(bench.ours(BEST[contender.target], count), truth)
            lines.append(
                {
                    "count": count, "name": contender.name, "truth": contender.target, "setting": setting.label,
                    "steps_in_our_time": round(exact, 3), "evaluations": more,
                    "psnr_db": [round(figure, 3) for figure in interval(levels)],
                    "lead_db": [round(figure, 3) for figure in paired(own, levels)],
                }
            )  # fmt: skip
            console.print(lines[-1], highlight=False)
    return lines


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one number of evaluations, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--work", type=Path, help=f"the folder of benchmarks.peers.equal; default {WORK}")
    parser.add_argument("--fitted", type=Path, help=f"that of benchmarks.fitted; default in {fitted.WORK}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    pin_threads()
    size = replace(WHOLE, held_out=1, counts=(10,)) if args.quick else WHOLE
    work = args.work or Path(task.results_of(str(WORK)))
    of_ours = fitted.WHOLE if not args.quick else replace(fitted.WHOLE, held_out=1)
    bench = Bench(size, work, fitted.Bench(of_ours, args.fitted or fitted.WORK / task.name, task))
    timed = json.loads((RESULTS / f"{task.results_of('peers_latency')}.json").read_text())
    lines = measure(bench, timed, Console(width=180))
    out = folder_of(args)
    if out is not None:
        samples = len(bench.truths[UNCACHED])
        assert len(bench.truths[CONVERGED]) == samples
        save(task.results_of("peers_equal_time"), {"task": task.name, "samples": samples, "lines": lines}, out)


if __name__ == "__main__":
    main()
