"""The app: every command of `moeca`. It needs typer and rich."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeca_compile import __version__
from moeca_compile.cli import bundles, compare, deploy, doctor, drift, explain, plans
from moeca_compile.cli.command import add
from moeca_compile.cli.params import AsJson, Picture
from moeca_compile.cli.say import print_json, say
from moeca_compile.cli.say import show as show_parts
from moeca_compile.inspect import plots, schedules
from moeca_compile.runtime.bundle.manifest import MANIFEST, SCHEDULE
from moeca_compile.schedule import Schedule

ScheduleFile = Annotated[
    Path, typer.Argument(metavar="SCHEDULE", help="A schedule's JSON file, or a bundle, whose schedule is taken.")
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # help is plain text: brackets are no markup there, as in moeca-compile[cli]
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        say(f"moeca-compile {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make, look at and deploy schedules of diffusion transformers.

    MODULE:FUNCTION names a function of a module that can be imported, from the current folder too. For a model it takes
    no arguments and returns (model, example_inputs).
    """


def show(schedule: ScheduleFile, json: AsJson = False, picture: Picture = None) -> None:
    """Print what a schedule says, and its grid of steps.

    Of a bundle it prints the schedule that lies in it; `moeca info` tells the rest.
    """
    loaded = _schedule(schedule)
    if json:
        print_json(schedules.facts(loaded))
    else:
        show_parts(*schedules.parts(loaded))
    if picture is not None:
        plots.save(plots.schedule_grid(loaded), picture)


def diff(left: ScheduleFile, right: ScheduleFile, json: AsJson = False) -> None:
    """Print what differs between two schedules.

    Exit status 1 if anything does.
    """
    difference = schedules.difference(_schedule(left), _schedule(right))
    if json:
        print_json(difference.to_json())
    else:
        show_parts(schedules.table_of_differences(difference, left.name, right.name) if difference else "the same")
    raise typer.Exit(1 if difference else 0)


def _schedule(path: Path) -> Schedule:
    return Schedule.load(path / SCHEDULE if (path / MANIFEST).exists() else path)


add(app, show, example="moeca show half.json --picture half.svg", if_stopped="nothing was written")
add(app, diff, example="moeca diff half.json model.moeca", if_stopped="nothing was written")
plans.mount(app)
compare.mount(app)
drift.mount(app)
explain.mount(app)
bundles.mount(app)
deploy.mount(app)
doctor.mount(app)
