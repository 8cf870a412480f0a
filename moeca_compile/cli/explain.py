"""`moeca explain`: what was found in a model and what each step runs, as text and as a page to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moeca_compile.cli import named
from moeca_compile.cli.command import add
from moeca_compile.cli.load import load, model_and_inputs, model_of
from moeca_compile.cli.params import NAMED, AsJson, Inner, Model, Weights
from moeca_compile.cli.params import Schedule as ScheduleText
from moeca_compile.cli.say import say, say_next
from moeca_compile.errors import OptionError
from moeca_compile.options import Options
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.file import FRONT_FORMAT
from moeca_compile.schedule.front import Front

Sampled = Annotated[
    str | None,
    typer.Option(
        "--sample",
        metavar=NAMED,
        help="Sample seed 0 with this function that takes (model, seed), for the milliseconds of each step. The model "
        "then needs no example inputs.",
    ),
]
Granularity = Annotated[
    str,
    typer.Option(
        help="What a column of the schedule is: region, stack, blocks:2:-2, skip:1 or output; by default what the "
        "schedule's file says."
    ),
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write the page to this .html file.")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Show what a calibration kept in this folder (`moeca calibrate --resume`)."),
]
Beside = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", exists=True, help="Show another schedule or front in the plot, too; repeatable."),
]
Uncached = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Show an image with every step computed; repeatable.")
]
Cached = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="Show the same image with the schedule; repeatable.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="How many steps the page shows.")]


def mount(app: typer.Typer) -> None:
    """Add the command to an app."""
    add(
        app, explain,
        example="moeca explain my.models:build --sample my.models:sample --schedule half.json --html report.html",
        if_stopped="no page was written",
    )  # fmt: skip


def explain(
    source: Model,
    schedule: ScheduleText = "uniform:3",
    sample: Sampled = None,
    weights: Weights = None,
    granularity: Granularity = "",
    html: Html = None,
    calibration: Calibration = None,
    beside: Beside = None,
    uncached: Uncached = None,
    cached: Cached = None,
    steps: Steps = None,
    inner: Inner = "eager",
    json: AsJson = False,
) -> None:
    """Say what was found in a model, and what each step runs.

    With --html it writes a page to look at: each step, milliseconds, quality, images, and the graphs of all passes.
    """
    of_page: dict[str, object] = {
        "--calibration": calibration,
        "--beside": beside,
        "--uncached": uncached,
        "--cached": cached,
    }
    of_page["--steps"] = steps
    if html is None and (unused := [name for name, value in of_page.items() if value]):
        raise OptionError(f"{', '.join(unused)}: these are for the page: add --html report.html")
    if html is not None and not html.resolve().parent.is_dir():
        raise OptionError(f"--html {html}: there is no folder {html.parent}")
    named.check(source, 0)
    if sample is not None:
        named.check(sample, 2)
    others = [entry for path in beside or () for entry in _schedules(path)]
    read = Options(schedule=schedule).resolved_schedule()
    options = {"schedule": read, "granularity": granularity or read.granularity or "region", "inner": inner}
    report = _report(source, weights, sample, options, html)
    if html is not None:
        from moeca_compile.planner.measured import measurements

        measured = None if calibration is None else measurements(calibration, report)
        report.to_html(
            html, uncached=uncached or (), cached=cached or (), measured=measured, others=others, steps=steps
        )
    if json:
        print(report.to_json())
        return
    for line in str(report).splitlines():
        say(line)
    if html is not None:
        say_next(f"open {html} in a browser")


def _report(source: str, weights: Path | None, sample: str | None, options: dict[str, Any], html: Path | None) -> Any:
    """Of the last call of a sampled model; else of the function's example inputs."""
    import moeca_compile as moeca

    if sample is not None:
        sampler, compiled = load(sample), moeca.compile(model_of(source, weights), **options)
        for _ in range(2):  # variants are made the first time
            sampler(compiled, 0)
        return moeca.explain(compiled, html=html)
    otherwise = (
        f". Add --sample with a function of (model, seed) that samples; then no inputs are needed: "
        f"moeca explain {source} --sample {source.partition(':')[0]}:sample"
    )
    inputs = model_and_inputs(source, otherwise)[1]
    model = model_of(source, weights)
    if isinstance(inputs, Mapping):
        return moeca.explain(model, keywords=inputs, html=html, **options)
    return moeca.explain(model, *inputs, html=html, **options)


def _schedules(path: Path) -> list[Schedule]:
    """Of a schedule's file, or of a front's."""
    if f'"{FRONT_FORMAT}"' in path.read_text()[:200]:
        return list(Front.load(path))
    return [Schedule.load(path)]
