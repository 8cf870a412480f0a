"""What a long call does meanwhile: messages, and a progress bar where `rich` is installed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressCallback = Callable[[str, float], None]  # what is being done, and how far: 0 to 1

log = logging.getLogger("moeca_compile")


def is_hidden() -> bool:
    """Whether the caller has set up logging so that messages at INFO aren't shown."""
    return _is_set_up() and not log.isEnabledFor(logging.INFO)


def tell(text: str) -> None:
    """A message at INFO. To stderr while nobody has set up logging or this logger's level; else logging decides."""
    if _is_set_up():
        log.info(text)
    else:
        print(text, file=sys.stderr)  # noqa: T201


def _is_set_up() -> bool:
    return log.hasHandlers() or log.level != logging.NOTSET


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
