"""Find a schedule for a budget: what calibrating on the model and the sampler themselves gains over a uniform one.

    python -m examples.03_calibrate                     # a small search for 34 % of the MACs, under a minute
    python -m examples.03_calibrate --budget psnr:45    # the cheapest that holds 45 dB
    python -m examples.03_calibrate --all               # make examples/schedules/ anew, about ten minutes

The loop below is the user's own: `calibrate` only asks that it depends on its seed alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule

SCHEDULES = Path(__file__).parent / "schedules"
# What 35 full steps cost; uniform:2, 3, 4 and 5; 8 and 6 full steps.
BUDGETS = {"70": 0.7022, "50": 0.5033, "34": 0.3443, "26": 0.2648, "20": 0.2052, "16": 0.1655, "13": 0.1257}
IMAGES = 4  # a seed
HOLDOUT = range(1000, 1004)


def sampler(steps: int = 50, guidance: float = 2.0) -> Callable[[Any, int], Tensor]:
    """A rectified flow's Euler steps; each seed draws `IMAGES` digits, the next ones in turn."""

    def sample(model: Any, seed: int) -> Tensor:
        x = digits.initial_noise(seed, IMAGES)
        labels = (torch.arange(IMAGES) + seed * IMAGES) % digits.CLASSES
        both = torch.cat([labels, torch.full_like(labels, digits.CLASSES)])
        for step in range(steps):
            t = torch.full((2 * IMAGES,), 1000.0 * (1 - step / steps))
            cond, uncond = model(torch.cat([x, x]), t, both).chunk(2)
            x = x - (uncond + guidance * (cond - uncond)) / steps
        return x

    return sample


def find(budget: str, seeds: int, effort: float | None = None, resume: Path | None = None) -> Schedule:
    """Calibrate the digits model."""
    return moeca.calibrate(
        digits.load_model(),
        sampler(),
        budget=budget,
        granularity="region",
        seeds=range(seeds),
        holdout=HOLDOUT,
        effort=effort,
        data_range=2.0,
        resume=resume,
    )


def report(schedule: Schedule, console: Console) -> None:
    """The schedule as a grid, and what is known of it."""
    console.print(str(schedule), highlight=False)
    table = Table("", "", show_header=False)
    shown = {
        "mac_fraction": ("share of the MACs", "{:.1%}"),
        "psnr_db": ("PSNR on the search's seeds, dB", "{:.1f}"),
        "psnr_db_holdout": ("PSNR on other seeds, dB", "{:.1f}"),
        "state_bytes": ("bytes of state", "{:.0f}"),
        "trajectories": ("cost of calibrating, in uncached trajectories", "{:.0f}"),
    }
    for key, (name, form) in shown.items():
        table.add_row(name, form.format(schedule.predicted[key]))
    for key, quality in schedule.predicted.items():
        if key.startswith("tried "):
            table.add_row(f"best {key.removeprefix('tried ')} on the seeds that it got to, dB", f"{quality:.1f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Calibrate a schedule for the digits model.")
    parser.add_argument("--budget", default="macs:0.3443", help="as moeca.calibrate takes it (default macs:0.3443)")
    parser.add_argument("--seeds", type=int, default=2, help="that the search sees (default 2; 16 make better ones)")
    parser.add_argument("--effort", type=float, default=8, help="rollouts, in uncached trajectories (default 8)")
    parser.add_argument("--out", type=Path, help="where the schedule goes; default nowhere")
    parser.add_argument("--resume", type=Path, help="folder that keeps what was found, to go on from there")
    parser.add_argument("--all", action="store_true", help=f"16 seeds, budgets {', '.join(BUDGETS)} %%: schedules/")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console()
    if args.all:
        SCHEDULES.mkdir(exist_ok=True)
        for name, share in BUDGETS.items():
            schedule = find(f"macs:{share}", seeds=16, resume=args.resume or Path("build/calibration"))
            schedule.save(SCHEDULES / f"digits_{name}.json")
            report(schedule, console)
        return
    schedule = find(args.budget, args.seeds, args.effort, args.resume)
    report(schedule, console)
    if args.out is not None:
        schedule.save(args.out)


if __name__ == "__main__":
    main()
