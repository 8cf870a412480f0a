"""Frechet distances of many samples: of the uncached run, of fitted schedules, and of the best peers.

    python -m benchmarks.frechet                  # about three hours on one core; writes results/frechet.json
    python -m benchmarks.frechet --task glyphs    # the glyphs model; writes results/frechet_glyphs.json
    python -m benchmarks.frechet --no-converged --samples 1000    # less; a later run goes on from there
    python -m benchmarks.frechet --quick          # two batches of few samples: does it run?
    python -m benchmarks.frechet --report         # the table of docs/fitted.md

All contenders make the same samples, a batch of each in turn, so that a run that was stopped has as many of each. A
batch is kept as its features in the task's judge. Schedules are those of `python -m benchmarks.fitted`; peers are the
nearest to each truth in the task's results of benchmarks.peers.equal, in the same settings. Nothing is timed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import moeca_compile as moeca
from benchmarks import fitted
from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.pages import write_table
from benchmarks.paired import NORMAL
from benchmarks.peers.equal import roster
from benchmarks.peers.equal.__main__ import WHOLE
from benchmarks.peers.equal.__main__ import WORK as PEERS
from benchmarks.peers.equal.lab import Lab, batch_of
from benchmarks.peers.equal.measure import Bench as Peers
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save, when
from benchmarks.tasks import DIGITS, TASKS, Task
from examples import digits
from examples.frechet import Judge, features_of, frechet
from examples.glyphs import data as glyphs_data
from examples.glyphs import judge as glyphs_judge
from examples.glyphs.fonts import FOLDER
from examples.train_digits import real_digits
from moeca_compile.schedule import Schedule

WORK = Path("build/frechet")
FIRST_SEED = 80_000
BATCH, SAMPLES = 100, 5000
SHARES = {17: 34, 10: 20}  # by computed steps: of the steps, in percent
REPLICATES = 200
EVERY_STEP, SOLVED = "every step computed", "converged"
MARKS = {
    "digits": "<!-- python -m benchmarks.frechet --report -->",
    "glyphs": "<!-- python -m benchmarks.frechet --task glyphs --report -->",
}

Draw = Callable[[int], Tensor]  # the samples of a seed


class Contender(NamedTuple):
    """What draws samples, built at its first batch."""

    evaluations: int  # of the model, a sample
    mark: str  # another one where it draws otherwise: features of an earlier schedule aren't taken for its own
    build: Callable[[], Draw]


def judge_of(task: Task) -> Judge:
    return digits.load_classifier() if task is DIGITS else glyphs_judge.load()


def real(task: Task) -> Tensor | None:
    """Real images; None: glyphs that nobody rendered here."""
    if task is DIGITS:
        return real_digits()[0]
    return glyphs_data.load("test")[0] if (FOLDER / "glyphs.npz").exists() else None


class Bench:
    """What draws samples of a task; each contender is built at its first batch."""

    def __init__(self, schedules: fitted.Bench, peers: Path, batch: int = BATCH) -> None:
        """Nothing is loaded yet.

        Args:
            schedules: where ours come from.
            peers: the folder of `benchmarks.peers.equal`.
            batch: samples a seed.
        """
        self.schedules, self.task, self.peers, self.batch = schedules, schedules.task, peers, batch

    def contenders(self, with_converged: bool) -> dict[str, Contender]:
        """By name."""
        steps = self.schedules.size.steps
        found = {EVERY_STEP: Contender(steps, str(steps), partial(self._plain, steps, False))}
        for count, share in SHARES.items():
            for truth in (UNCACHED, CONVERGED):
                schedule = self.schedules.schedule(share, truth)
                own = Contender(count, fitted.mark_of(schedule), partial(self._ours, schedule))
                found[f"moeca output, fitted to {truth}, {count}"] = own
            for name, label in best_peers(self.task, count):
                found[f"{name}, {count}"] = Contender(count, label, partial(self._peer, name, label, count))
        if with_converged:
            finer = self.schedules.size.finer * steps
            found[SOLVED] = Contender(finer, str(finer), partial(self._plain, finer, True))
        return found

    @cached_property
    def _model(self) -> Any:
        model = self.task.load().requires_grad_(False)
        moeca.prepare(model)
        return torch.compile(model, backend=self.schedules.inner)

    def _plain(self, steps: int, second_order: bool) -> Draw:
        sample = self.task.sampler(self.batch, steps, second_order)
        return lambda seed: sample(self._model, seed)

    def _ours(self, schedule: Schedule) -> Draw:
        model = self.task.load().requires_grad_(False)
        moeca.prepare(model)
        compiled = moeca.compile(model, schedule=schedule, granularity="output", inner=self.schedules.inner)
        sample = self.task.sampler(self.batch, self.schedules.size.steps)

        def draw(seed: int) -> Tensor:
            moeca.reset(compiled)
            return sample(compiled, seed)

        return draw

    def _peer(self, name: str, label: str, count: int) -> Draw:
        """A peer in the setting of that label."""
        contender = next(one for one in roster.contenders() if one.name == name)
        setting = next(one for one in contender.settings(self._lab, count) if one.label == label)

        def draw(seed: int) -> Tensor:
            return setting.draw(batch_of(self.task, seed, self.batch))

        return draw

    @cached_property
    def _lab(self) -> Lab:
        return Peers(replace(WHOLE, counts=tuple(SHARES)), self.peers, self.schedules).lab


def best_peers(task: Task, count: int) -> list[tuple[str, str]]:
    """The peers nearest to each truth at that many evaluations, with their settings."""
    lines = json.loads((RESULTS / f"{task.results_of('peers_equal')}.json").read_text())["lines"]
    peers = [line for line in lines if line["count"] == count and line["kind"] != "moeca"]
    best = [max(peers, key=lambda line: line["psnr_db"][truth][0]) for truth in (UNCACHED, CONVERGED)]
    return list(dict.fromkeys((line["name"], line["setting"]) for line in best))


class Kept:
    """Features of the contenders' batches, in files."""

    def __init__(self, folder: Path, judge: Judge) -> None:
        self.folder, self.judge = folder, judge
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, mark: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '_', f'{name} {mark}'.lower())}_{seed}.npy"

    def add(self, file: Path, images: Tensor) -> None:
        np.save(file.with_suffix(".part.npy"), features_of(self.judge, images).numpy())
        file.with_suffix(".part.npy").replace(file)

    def features(self, name: str, mark: str, seeds: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.load(self.file(name, mark, seed)) for seed in seeds]))


def distances(features: Mapping[str, Tensor], of_real: Tensor | None, seed: int = 0) -> list[dict[str, Any]]:
    """Of each contender: distances, and that to real images less the uncached run's, with 95 % intervals.

    An interval is 1.96 standard deviations of a bootstrap over the samples, which are drawn alike for all contenders.

    Args:
        features: by contender (N, features), of the same samples; one of them is `EVERY_STEP`.
        of_real: of real images.
        seed: of the bootstrap.
    """
    count = len(features[EVERY_STEP])
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(count, (count,), generator=generator) for _ in range(REPLICATES)]

    def found(pick: Tensor | slice) -> dict[str, dict[str, float]]:
        told: dict[str, dict[str, float]] = {}
        for name, own in features.items():
            told[name] = {} if of_real is None else {"real": frechet(own[pick], of_real)}
            told[name] |= {ref: frechet(own[pick], features[ref][pick]) for ref in (SOLVED,) if ref in features}
        for name in features if of_real is not None else ():
            told[name]["real_less_uncached"] = told[name]["real"] - told[EVERY_STEP]["real"]
        return told

    whole, again = found(slice(None)), [found(pick) for pick in picks]
    return [
        {
            "name": name,
            **{
                key: [round(value, 5), round(NORMAL * float(np.std([one[name][key] for one in again], ddof=1)), 5)]
                for key, value in whole[name].items()
            },
        }
        for name in features
    ]


def measure(bench: Bench, kept: Kept, samples: int, with_converged: bool, console: Console) -> dict[str, Any]:
    """Draw what is missing; the figures of all batches that every contender has."""
    contenders = bench.contenders(with_converged)
    seeds = range(FIRST_SEED, FIRST_SEED + samples // bench.batch)
    opened: dict[str, Draw] = {}
    for seed in seeds:
        for name, contender in contenders.items():
            file = kept.file(name, contender.mark, seed)
            if not file.exists():
                opened[name] = opened.get(name) or contender.build()
                kept.add(file, opened[name](seed))
        console.print(f"{bench.batch * (seed - FIRST_SEED + 1)} samples of each", style="dim")
    return figures(bench, kept, list(seeds), contenders)


def figures(bench: Bench, kept: Kept, seeds: Sequence[int], contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """Of features that are in files."""
    images = real(bench.task)
    of_real = None if images is None else features_of(kept.judge, images)
    lines = distances({name: kept.features(name, one.mark, seeds) for name, one in contenders.items()}, of_real)
    told: dict[str, Any] = {"task": bench.task.name, "samples": bench.batch * len(seeds), "real": None}
    if of_real is not None:
        halves = of_real[torch.randperm(len(of_real), generator=torch.Generator().manual_seed(0))].chunk(2)
        told["real"] = {"images": len(of_real), "between_halves": round(frechet(*halves), 5)}
    told["lines"] = [{**line, "evaluations": contenders[line["name"]].evaluations} for line in lines]
    return told


COLUMNS = {"real": "to real images", "real_less_uncached": "less uncached run", SOLVED: "to the converged samples"}


def columns_of(result: Mapping[str, Any]) -> list[str]:
    """The distances that were measured."""
    return [key for key in COLUMNS if any(key in line for line in result["lines"])]


def heads_of(result: Mapping[str, Any]) -> list[str]:
    """Of the table's columns."""
    return ["evaluations", "contender", *map(COLUMNS.__getitem__, columns_of(result))]


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        cells = [str(line["evaluations"]), re.sub(r", \d+$", "", line["name"])]
        for key in columns_of(result):
            is_less = key == "real_less_uncached"
            itself = line["name"] == (EVERY_STEP if is_less else SOLVED if key == SOLVED else "")
            sign = "+" if is_less else ""
            cells.append("" if itself or key not in line else f"{line[key][0]:{sign}.4f} ± {line[key][1]:.4f}")
        rows.append(cells)
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    result = json.loads(results.read_text())
    about = result["real"]
    floor = f"; two halves of the {about['images']} real ones: {about['between_halves']:.4f}" if about else ""
    note = f"{result['samples']} {result['task']} of each{floor}; {when(result['machine'])}."
    write_table(page, MARKS[result["task"]], heads_of(result), rows_of(result), note)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "two batches of four samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of each contender; default {SAMPLES}")
    parser.add_argument("--no-converged", action="store_true", help="without the converged run, half of the work")
    parser.add_argument("--work", type=Path, help=f"folder of features; default in {WORK}")
    parser.add_argument("--fitted", type=Path, help="the folder of benchmarks.fitted; default its own")
    parser.add_argument("--peers", type=Path, help="of benchmarks.peers.equal; default its own")
    parser.add_argument("--report", action="store_true", help=f"only write {fitted.PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("frechet")
    if args.report:
        report(RESULTS / f"{name}.json", fitted.PAGE)
        return
    pin_threads()
    console = Console(width=160)
    schedules = fitted.Bench(fitted.WHOLE, args.fitted or fitted.WORK / task.name, task)
    batch, samples = (4, 8) if args.quick else (BATCH, args.samples)
    kept = Kept(args.work or WORK / (f"quick_{task.name}" if args.quick else task.name), judge_of(task))
    peers = args.peers or Path(task.results_of(str(PEERS)))
    result = measure(Bench(schedules, peers, batch), kept, samples, not args.no_converged, console)
    for row in rows_of(result):
        console.print(*row, sep="  ")
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)


if __name__ == "__main__":
    main()
