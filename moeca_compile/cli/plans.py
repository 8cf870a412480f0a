"""`moeca calibrate`: a schedule for a budget, at the command line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from moeca_compile.cli.load import load, model_of
from moeca_compile.cli.params import AsJson, Inner, Sample, Seeds, Weights
from moeca_compile.cli.say import print_json, show
from moeca_compile.errors import OptionError
from moeca_compile.inspect import schedules

Source = Annotated[str, typer.Argument(help="package.module:function; it returns the model.")]
Budget = Annotated[
    str, typer.Option(help="macs:0.26, latency:0.4, speedup:2, psnr:45, state:64MiB; several by commas.")
]
Out = Annotated[Path, typer.Option(help="The schedule's JSON file to write.")]
Order = Annotated[str, typer.Option(help="Of the forecasts: 0, 1, 2 or auto.")]
Granularity = Annotated[str, typer.Option(help="region, stack, blocks:2:-2, skip:1 or auto.")]
Holdout = Annotated[int, typer.Option(help="How many seeds only the final check sees: 1000, 1001, ...")]
Resume = Annotated[Path | None, typer.Option(help="A folder that keeps what is found, to go on from or plan again.")]
Perturb = Annotated[int, typer.Option(help="Experts to make stale one by one, at most; each costs two trajectories.")]
Branches = Annotated[float, typer.Option(help="Also try cheap rows that compute this share of the branches, 0.04.")]


def mount(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command()(calibrate)
    app.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(plan)


def calibrate(
    source: Source,
    sample: Sample,
    budget: Budget,
    out: Out,
    weights: Weights = None,
    order: Order = "auto",
    granularity: Granularity = "auto",
    seeds: Seeds = 8,
    holdout: Holdout = 2,
    inner: Inner = "inductor",
    resume: Resume = None,
    perturb: Perturb = 0,
    branches: Branches = 0.0,
    json: AsJson = False,
) -> None:
    """Find the best schedule that a budget allows, by sampling the model.

    With --resume and a folder that an earlier calibration kept, only new schedules are sampled.
    """
    if not out.resolve().parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}")
    model, sampler = model_of(source, weights), load(sample)
    from moeca_compile.planner import calibrate as find

    if perturb and not json:
        print(f"at most {perturb} experts are made stale, for about {2 * perturb} uncached trajectories")
    try:
        schedule = find(
            model,
            sampler,
            budget=budget,
            order=int(order) if order.isdecimal() else order,
            granularity=granularity,
            seeds=seeds,
            holdout=holdout,
            inner=inner,
            resume=resume,
            perturb=perturb,
            branches=branches,
            progress=not json,
        )
    except KeyboardInterrupt as stop:
        for note in getattr(stop, "__notes__", ()):  # what is kept, and how to go on from there
            print(note, file=sys.stderr)
        raise
    schedule.save(out)
    if json:
        print_json(schedules.facts(schedule))
    else:
        show(schedules.table_of_facts(schedule), "", schedules.grid(schedule))


def plan(context: typer.Context) -> None:
    """Replaced by `moeca calibrate --resume FOLDER`."""
    raise OptionError(f"`moeca plan` is `moeca calibrate` with --resume: moeca calibrate {shlex.join(context.args)}")
