"""A progress bar where `rich` is installed; nothing else depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressCallback = Callable[[str, float], None]  # what is being done, and how far: 0 to 1


@contextmanager
def bar(show: bool) -> Iterator[ProgressCallback]:
    try:
        from rich.progress import Progress
    except ImportError:
        show = False
    if not show:
        yield lambda text, share: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda text, share: progress.update(task, completed=min(share, 1.0), description=text)
