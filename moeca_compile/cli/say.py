"""How commands print: what comes from files is shown and never obeyed by a terminal, and JSON is JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeca_compile.runtime.bundle.summary import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


class _Visible:
    """Another thing to print, whose own text has no control characters left."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def show(*parts: RenderableType) -> None:
    """Print tables, grids and lines. A text is no markup: region names have brackets."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(_Visible(part))


def say(text: object) -> None:
    """Print one line, as long as it is."""
    print(visible(str(text)))


def say_next(command: str) -> None:
    """Print the command that usually comes next."""
    say(f"next: {command}")


def print_json(value: Any) -> None:
    """Print JSON and nothing else: numbers that JSON doesn't have (NaN, Infinity) are null."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
