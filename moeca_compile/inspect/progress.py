"""A progress bar where `rich` is installed; nothing else depends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressCallback = Callable[[str, float], None]  # what is being done, and how far: 0 to 1


@contextmanager
def bar(show: bool) -> Iterator[ProgressCallback]:
    """A bar on stderr while it is a terminal: what a command prints can be piped meanwhile."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        show = False
    if not (show and sys.stderr.isatty()):
        yield lambda text, share: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda text, share: progress.update(task, completed=min(share, 1.0), description=text)
