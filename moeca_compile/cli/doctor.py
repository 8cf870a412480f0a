"""`moeca doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

from typing import Annotated

import typer

from moeca_compile import __version__
from moeca_compile.cli.command import add
from moeca_compile.cli.params import AsJson
from moeca_compile.cli.say import print_json, say, say_next, show

Compile = Annotated[
    bool, typer.Option("--compile", help="Also compile a small function with Inductor; it takes up to a minute.")
]
Report = Annotated[
    bool, typer.Option("--report", help="Print a block of Markdown to paste into a bug report, and nothing else.")
]


def mount(app: typer.Typer) -> None:
    """Add the command to an app."""
    add(app, doctor, example="moeca doctor --compile", if_stopped="nothing was written")


def doctor(compile: Compile = False, report: Report = False, json: AsJson = False) -> None:
    """Try what works on this machine.

    Each of torch, the C++ compiler, onnxruntime, OpenVINO, TensorRT and diffusers is tried in a process of its own.
    Exit status 1 if torch doesn't work.
    """
    from moeca_compile.inspect.doctor.diagnosis import diagnose

    diagnosis = diagnose(__version__, compile)
    if json:
        print_json(diagnosis.to_json())
    elif report:
        say(diagnosis.to_markdown())
    else:
        for table in diagnosis.tables():
            show(table, "")
        say_next("moeca doctor --report, for a bug report")
    raise typer.Exit(0 if diagnosis.healthy else 1)
