"""`moeca calibrate`: a schedule for a budget; `moeca merge`: what several machines sampled for one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moeca_compile.cli import named
from moeca_compile.cli.command import add
from moeca_compile.cli.load import load, model_of
from moeca_compile.cli.params import AsJson, Inner, Model, Sample, Seeds, Weights
from moeca_compile.cli.say import print_json, say, say_next, show
from moeca_compile.cli.truth import read_truth_option
from moeca_compile.errors import OptionError
from moeca_compile.inspect import schedules
from moeca_compile.schedule.budget import read_bytes
from moeca_compile.schedule.granularity import Granularity

Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget",
        help="What the schedule may cost, or how good it must be: speedup:2, latency:0.5, macs:0.26, state:64MiB or "
        "psnr:45; several of them with commas between. Repeat the option for a front: schedules for several budgets in "
        "one file.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="Write the schedule to this .json file.")]
Truths = Annotated[
    str,
    typer.Option(
        "--truth",
        metavar="TRUTH",
        help="What samples should be near: uncached; samples of your own, as an .npz file with one array a seed or a "
        "folder of SEED.npy; or, with --granularity output, converged for the solution that the sampler comes to with "
        "more steps.",
    ),
]
Order = Annotated[str, typer.Option(help="The order of the forecasts: 0, 1 or 2; auto tries all of them.")]
Granularities = Annotated[
    str,
    typer.Option(
        "--granularity",
        help="What a column of the schedule is: region, stack, blocks:2:-2, skip:1 or output; auto tries regions and "
        "the stack.",
    ),
]
Holdout = Annotated[int, typer.Option(min=0, help="How many seeds only the final check sees: 1000, 1001, ...")]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep what is found in this folder: the same command goes on from there, another budget uses it too.",
    ),
]
Perturb = Annotated[
    int, typer.Option(min=0, help="Make this many experts stale, one by one; each costs two trajectories.")
]
Effort = Annotated[
    float | None,
    typer.Option(help="How many uncached trajectories the search may sample; default 1.25 a seed."),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        help="How much of what is measured is in memory at once, as in 4GiB; the rest goes to a temporary folder. The "
        "weights of --granularity output are fitted together only where their derivatives fit in four times as much.",
    ),
]
Branches = Annotated[
    float,
    typer.Option(min=0, max=1, help="Also try cheap rows that compute this share of the expert branches, as in 0.04."),
]


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    add(
        app, calibrate,
        example="moeca calibrate my.models:build --sample my.models:sample --budget speedup:2 --out half.json",
        if_stopped="nothing was kept; with --resume FOLDER the same command goes on where it was",
    )  # fmt: skip
    add(
        app, merge,
        example="moeca merge all shard0 shard1",
        if_stopped="{folder} has what was merged so far; the same command goes on",
    )  # fmt: skip
    app.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(plan)


def calibrate(
    source: Model,
    sample: Sample,
    budgets: Budgets,
    out: Out,
    weights: Weights = None,
    order: Order = "auto",
    granularity: Granularities = "auto",
    seeds: Seeds = 8,
    holdout: Holdout = 2,
    inner: Inner = "inductor",
    resume: Resume = None,
    effort: Effort = None,
    memory: Memory = "1GiB",
    perturb: Perturb = 0,
    branches: Branches = 0.0,
    truth: Truths = "uncached",
    json: AsJson = False,
) -> None:
    """Find the best schedule that a budget allows.

    The model is sampled with every step computed first, and then with the schedules that look best. With --resume and a
    folder that an earlier calibration kept, only new schedules are sampled.
    """
    forecast_order = int(order) if order.isdecimal() else order
    wanted, granted = read_truth_option(truth), read_bytes(memory, "--memory ")
    asked: dict[str, Any] = {
        "order": forecast_order,
        "seeds": seeds,
        "holdout": holdout,
        "effort": effort,
        "memory": granted,
        "resume": resume,
        "perturb": perturb,
        "branches": branches,
    }
    for budget in budgets:
        _refuse_early(source, sample, out, granularity, budget, asked)
    model, sampler = model_of(source, weights), load(sample)
    from moeca_compile import planner

    arguments = asked | {"granularity": granularity, "inner": inner, "truth": wanted, "progress": not json}
    if len(budgets) > 1:
        front = planner.calibrate_front(model, sampler, budgets=budgets, **arguments)
        front.save(out)
        if json:
            print_json([schedules.facts(schedule) for schedule in front])
            return
        for schedule in front:
            show(*schedules.parts(schedule), "")
        say_next(f"moeca.compile(model, schedule='{out}@{budgets[0]}')")
        return
    schedule = planner.calibrate(model, sampler, budget=budgets[0], **arguments)
    schedule.save(out)
    if json:
        print_json(schedules.facts(schedule))
        return
    show(*schedules.parts(schedule))
    say_next(f"moeca export {source} model.moeca --schedule {out}, or moeca.compile(model, schedule={str(out)!r})")


def merge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where all of it goes; for --resume.")],
    shards: Annotated[
        list[Path],
        typer.Argument(metavar="SHARD...", help="Folders of moeca.calibrate_shard, or of calibrate's --resume."),
    ],
    json: AsJson = False,
) -> None:
    """Merge what calibrations on several machines kept.

    Samples, drift and rollouts of the same model and sampler; what the folder has already is compared, and stays.
    """
    from moeca_compile.planner import merge_shards

    seeds = merge_shards(folder, shards)
    if json:
        print_json({"seeds": seeds})
        return
    say(f"{folder} has the uncached samples of {len(seeds)} seeds")
    say_next(f"moeca calibrate MODULE:FUNCTION ... --resume {folder}")


def _refuse_early(source: str, sample: str, out: Path, granularity: str, budget: str, asked: Mapping[str, Any]) -> None:
    """Refuse what is wrong whatever the model is, before torch is imported, which takes seconds."""
    from moeca_compile.planner.request import Request

    named.check(source, 0)
    named.check(sample, 2)
    if not out.resolve().parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}")
    if granularity != "auto":
        Granularity.parse(granularity)
    Request.read(budget, max_variants=2, data_range=None, **asked)


def plan(context: typer.Context) -> None:
    """Replaced by `moeca calibrate --resume FOLDER`."""
    raise OptionError(f"`moeca plan` is `moeca calibrate` with --resume: moeca calibrate {shlex.join(context.args)}")
