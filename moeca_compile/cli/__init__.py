"""`moeca`: the commands. Each reads files, calls the package and prints a table, or with --json the same as JSON."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

from moeca_compile import __version__
from moeca_compile.errors import MoecaError
from moeca_compile.inspect import plots, schedules
from moeca_compile.runtime.bundle.manifest import MANIFEST, SCHEDULE
from moeca_compile.runtime.bundle.summary import visible
from moeca_compile.schedule import Schedule

try:
    import typer

    from moeca_compile.cli import bundles, deploy, drift, plans
    from moeca_compile.cli.params import AsJson, Picture
    from moeca_compile.cli.say import print_json, say
    from moeca_compile.cli.say import show as show_parts
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    raise SystemExit("the command line needs typer and rich: pip install 'moeca-compile[cli]'") from None

ScheduleFile = Annotated[Path, typer.Argument(help="A schedule's JSON file, or a bundle's directory.")]

TRACEBACK = "MOECA_TRACEBACK"
MISTAKE, UNEXPECTED = 2, 70

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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
    """Schedules and bundles for diffusion transformers with mixture of experts."""


@app.command()
def show(schedule: ScheduleFile, json: AsJson = False, picture: Picture = None) -> None:
    """Print what a schedule says, and its grid of steps and regions."""
    loaded = _schedule(schedule)
    if json:
        print_json(schedules.facts(loaded))
    else:
        show_parts(schedules.table_of_facts(loaded), "", schedules.grid(loaded))
    if picture is not None:
        plots.save(plots.schedule_grid(loaded), picture)


@app.command()
def diff(left: ScheduleFile, right: ScheduleFile, json: AsJson = False) -> None:
    """Print what differs between two schedules; exit status 1 if anything does."""
    difference = schedules.difference(_schedule(left), _schedule(right))
    if json:
        print_json(difference.to_json())
    else:
        show_parts(schedules.table_of_differences(difference, left.name, right.name) if difference else "the same")
    raise typer.Exit(1 if difference else 0)


def _schedule(path: Path) -> Schedule:
    return Schedule.load(path / SCHEDULE if (path / MANIFEST).exists() else path)


plans.mount(app)
drift.mount(app)
bundles.mount(app)
deploy.mount(app)


def main() -> None:
    """Run `moeca`. Exit status 2 and one line for a mistake that the caller can mend; 70 and one line for whatever else
    is raised, a model's own errors too. With MOECA_TRACEBACK set, the whole traceback."""
    try:
        app(prog_name="moeca")
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        if isinstance(error, MoecaError):
            _end(MISTAKE, str(error))
        if isinstance(error, OSError) and error.filename is not None:
            _end(MISTAKE, f"{error.filename}: {error.strerror}")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _end(UNEXPECTED, f"{text} ({Path(frame.filename).name}, line {frame.lineno}; {TRACEBACK}=1 shows more)")


def _end(status: int, text: str) -> NoReturn:
    print(f"moeca: {visible(text)}", file=sys.stderr)
    raise SystemExit(status) from None
