"""`moeca`: the commands. Each reads files, calls the package and prints a table, or with --json the same as JSON.

Importing this package needs neither typer nor rich: torch imports it for `TORCH_LOGS="+moeca_compile"`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from moeca_compile.errors import MoecaError
from moeca_compile.runtime.bundle.summary import visible

TRACEBACK = "MOECA_TRACEBACK"
MISTAKE, UNEXPECTED = 2, 70

_NO_TYPER = "the command line needs typer and rich: pip install 'moeca-compile[cli]'"
_NEEDED = {
    "typer": _NO_TYPER,
    "rich": _NO_TYPER,
    "torch": "this command needs torch, which isn't installed here: pip install torch",
}


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'moeca_compile.cli' has no attribute {name!r}")
    from moeca_compile.cli.commands import app

    return app


def main() -> None:
    """Run `moeca`. Exit status 2 and one line for a mistake that the caller can mend; 70 and one line for whatever else
    is raised, a model's own errors too. With MOECA_TRACEBACK set, the whole traceback."""
    try:
        from moeca_compile.cli.commands import app

        app(prog_name="moeca")
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
            _end(MISTAKE, _NEEDED[error.name])
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
