"""`moeca`: the commands. Each reads files, calls the package and prints a table, or with --json the same as JSON."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Any

from moeca_compile.errors import MoecaError
from moeca_compile.inspect import plots, schedules
from moeca_compile.schedule import Schedule

try:
    import typer
    from rich.console import Console, RenderableType

    from moeca_compile.cli import bundles, deploy, drift, plans
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    raise SystemExit("the command line needs typer and rich: pip install 'moeca-compile[cli]'") from None

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
ScheduleFile = Annotated[Path, typer.Argument(help="A schedule's JSON file.")]
Picture = Annotated[Path | None, typer.Option(help="Draw into this .png or .svg.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """Schedules and bundles for diffusion transformers with mixture of experts."""


@app.command()
def show(schedule: ScheduleFile, json: AsJson = False, picture: Picture = None) -> None:
    """What a schedule says, and its grid of steps and regions."""
    one = Schedule.load(schedule)
    _print(schedules.facts(one) if json else (schedules.table_of_facts(one), "", schedules.grid(one)))
    if picture is not None:
        plots.save(plots.schedule_grid(one), picture)


@app.command()
def diff(left: ScheduleFile, right: ScheduleFile, json: AsJson = False) -> None:
    """What differs between two schedules; exit status 1 if anything does."""
    found = schedules.difference(Schedule.load(left), Schedule.load(right))
    if json:
        _print(found.to_json())
    else:
        _print((schedules.table_of_differences(found, left.name, right.name) if found else "the same",))
    raise typer.Exit(1 if found else 0)


plans.mount(app)
drift.mount(app)
bundles.mount(app)
deploy.mount(app)


def _print(what: dict[str, Any] | tuple[RenderableType, ...]) -> None:
    if isinstance(what, dict):
        print(json_text.dumps(what, indent=1))
        return
    console = Console(highlight=False)
    for one in what:
        console.print(one)


def main() -> None:
    """Run `moeca`: exit status 2 and one line for a mistake that the caller can mend."""
    try:
        app()
    except MoecaError as error:
        print(f"moeca: {error}", file=sys.stderr)
        raise SystemExit(2) from None
