"""How a command is added to the app: with an example in its help, and with what Ctrl-C leaves behind."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer


def add(app: typer.Typer, function: Callable[..., None], example: str, if_stopped: str) -> None:
    """Add a command, named after its function.

    Args:
        app: to which the command is added.
        function: its docstring is the help text.
        example: a command line that the help shows.
        if_stopped: what Ctrl-C leaves, with the function's arguments in braces. Notes on the KeyboardInterrupt that
            leaves the function are printed in its place: they know more.
    """

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        try:
            function(**arguments)
        except KeyboardInterrupt as stop:
            for line in getattr(stop, "__notes__", [if_stopped.format(**arguments)]):
                print(f"moeca: stopped; {line}", file=sys.stderr)
            raise

    # \b: these lines are not filled up to the width of the terminal
    app.command(epilog=f"\b\nExample:\n  {example}")(run)
