"""The time of some contenders at 17 of 50 evaluations, in turns: what a cheap step costs beside a full one.

    python -m benchmarks.peers.equal.latency            # at most 8 minutes on a quiet core; results/peers_latency.json
    python -m benchmarks.peers.equal.latency --task glyphs    # 15 minutes; results/peers_latency_glyphs.json
    python -m benchmarks.peers.equal.latency --quick    # few digits: does it run?

The settings' quality is told by `python -m benchmarks.peers.equal`. Our schedule is the one that
`python -m benchmarks.fitted` left or committed, or else one that is calibrated on few digits now: its time doesn't
depend on what its weights were fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import moeca_compile as moeca
from benchmarks import fitted
from benchmarks.fitted import UNCACHED, computed
from benchmarks.peers import dbcache, hooked_blocks, ours, taylorseer
from benchmarks.peers.equal import multistep
from benchmarks.peers.equal.lab import OfTask
from benchmarks.peers.equal.multistep import euler_sum
from benchmarks.peers.measure import heat
from benchmarks.peers.way import Family, Way
from benchmarks.peers.workload import Batch, Size, Truth, Workload, relative_l2
from benchmarks.protocol import arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS, Task
from moeca_compile.schedule import Action, Schedule

COUNT, SHARE = 17, 34
FEW = fitted.Size(50, 4, (SHARE,), 4, 4, 1, 4)
WORK = Path("build/peers_latency")
WHOLE, QUICK = Size(8, 5, 50), Size(2, 1, 50)


@dataclass(frozen=True)
class Timed(OfTask):
    """Compared with the uncached samples alone: here quality only shows that the right thing ran."""

    def truth(self) -> Truth:
        return Workload.truth(self)

    def figures(self, images: Tensor, truth: Truth) -> dict[str, Any]:
        return {"relative_l2": relative_l2(images, truth.uncached)}


class Sampler:
    """Calibrated multistep on the compiled model; its times don't depend on its weights."""

    def __init__(self, work: Workload, at: Sequence[int]) -> None:
        self.work, self.model = work, torch.compile(work.prepared())
        self.rule = multistep.polynomial(at, work.size.steps, 2, euler_sum)

    def sample(self, batch: Batch) -> Tensor:
        velocity = self.work.velocity(self.model, batch)
        return self.rule.sample(lambda x, t: ((v := velocity(x, t)), v), batch.noise)

    def macs(self) -> float:
        return len(self.rule.at) / self.work.size.steps

    def state_bytes(self) -> int:
        return 0

    def forget(self) -> None:
        pass


def cheap_steps(task: Task, schedule: Schedule, samples: int, rounds: int) -> dict[str, Any]:
    """The median time of a cheap step of the output and of a full one, in turns as the schedule has them."""
    model = task.load().requires_grad_(False)
    moeca.prepare(model)
    compiled = moeca.compile(model, schedule=schedule, granularity="output")
    labels, noise = task.labels_of(0, samples), task.noise(0, samples)
    both, latents = torch.cat([labels, torch.full_like(labels, task.classes)]), torch.cat([noise, noise])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):  # the first one compiles
        moeca.reset(compiled)
        for time, row in zip(schedule.timesteps, schedule.rows, strict=True):
            timesteps = torch.full((2 * samples,), time)
            begin = perf_counter()
            compiled(latents, timesteps, both)
            if number:
                seconds[row[0] is Action.COMPUTE].append(perf_counter() - begin)
    full, cheap = (1000 * median(seconds[is_full]) for is_full in (True, False))
    return {"samples": samples, "full_ms": round(full, 3), "cheap_ms": round(cheap, 4), "share": round(cheap / full, 5)}


class FewDigits(fitted.Bench):
    """Its own compiles aren't worth their time here."""

    inner = "eager"


def of_output(folder: Path, task: Task) -> Schedule:
    """Our schedule of the output, from the folder of `benchmarks.fitted`; or calibrated now, and kept."""
    bench = fitted.Bench(fitted.WHOLE, folder, task)
    few = FewDigits(FEW, WORK / task.name, task)
    return (bench if bench.known(SHARE, UNCACHED) else few).schedule(SHARE, UNCACHED)


def families(output: Schedule, regions: Schedule) -> list[Family]:
    """`output`, `regions`: ours of these granularities."""
    at = [step for step, row in enumerate(output.rows) if row[0] is Action.COMPUTE]

    def family(name: str, side: Any, opened: Callable[[Any], Way], guarded: bool = False) -> Family:
        return Family(name, side, "", lambda work: {f"{COUNT} of 50": opened(work)}, guarded=guarded)

    return [
        family(
            "moeca output, fitted",
            "moeca",
            lambda work: ours.Moeca(work.prepared(), work, output, granularity="output"),
        ),
        family("moeca regions, calibrated", "moeca", lambda work: ours.Moeca(work.prepared(), work, regions)),
        family("calibrated multistep", "fewer steps", lambda work: Sampler(work, at)),
        family("TaylorSeer (diffusers)", "peer", _taylorseer),
        family(
            "TaylorSeer (diffusers), compiled as a whole", "peer", lambda work: _taylorseer(work, "whole"), guarded=True
        ),
        family("cache-dit, calibrated mask, Taylor 1", "peer", lambda work: _mask(work, at)),
        family("MagCache (diffusers)", "peer", _mag_cache),
    ]


def _taylorseer(work: Workload, compiled: taylorseer.Compiled = "modules") -> Way:
    """Interval 4, before 1, after 45: 17 full steps."""
    return taylorseer.Interval(taylorseer.TaylorSeer(work, 1, compiled), work, 4, 1, 45)


def _mask(work: Workload, at: Sequence[int]) -> Way:
    mask = [int(step in at) for step in range(work.size.steps)]
    cached = dbcache.DBCache(
        work, 1, "blocks", Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_mask=mask,
        steps_computation_policy="static",
    )  # fmt: skip
    return dbcache.Setting(cached, work)


def _mag_cache(work: Workload) -> Way:
    """The threshold that computes 17 steps or the next fewer."""
    mag = hooked_blocks.mag_cache(work, work.batches()[0], compiled=True)
    ratios = torch.as_tensor(mag.config.mag_ratios)
    for threshold in torch.logspace(-3, 0.5, 200).tolist():
        fields = {"threshold": threshold, "max_skip_steps": 6, "retention_ratio": 0.04}
        if hooked_blocks.mag_computes(ratios, **fields) <= COUNT:
            return hooked_blocks.Setting(mag, **fields)
    raise ValueError(f"MagCache: no threshold computes {COUNT} steps or fewer")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "few digits")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--fitted", type=Path, help=f"folder of ours; default in {fitted.WORK}")
    args = parser.parse_args(argv)
    pin_threads()
    task = TASKS[args.task]
    folder = args.fitted or fitted.WORK / task.name
    output = of_output(folder, task)
    regions = fitted.Bench(fitted.WHOLE, folder, task).schedule(SHARE, fitted.REGIONS)
    assert computed(output) == COUNT
    work, console = Timed(QUICK if args.quick else WHOLE, task), Console(width=140)
    result = heat(families(output, regions), work, work.truth(), lambda text: console.print(text, style="dim"))
    for point in result["points"]:
        console.print(point["family"], point["speedup"], point["speedup_of_processor_time"], point["macs"])
    sizes = (work.size.digits,) if args.quick else (work.size.digits, 2 * work.size.digits, 4 * work.size.digits)
    cheap = [cheap_steps(task, output, samples, work.size.rounds) for samples in sizes]
    for one in cheap:
        console.print(one)
    out = folder_of(args)
    if out is not None:
        save(task.results_of("peers_latency"), {"size": asdict(work.size), **result, "cheap_steps": cheap}, out)


if __name__ == "__main__":
    main()
