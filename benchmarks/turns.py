"""Compile side by side, time one after the other: each job in a process of its own, all on one machine.

    for name, result in in_turns({"small": partial(job, 1), "large": partial(job, 8)}):
        ...

A job is a generator that yields twice: once it has compiled, whatever it likes, and then its result. Nothing of it
runs between the two until all have compiled and those named before it are timed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Job = Callable[[], Iterator[Any]]


def in_turns(jobs: Mapping[str, Job]) -> Iterator[tuple[str, Any]]:
    """Each job's name and result, in their order, as soon as it is there. A job that raises prints why, the others go
    on, and RuntimeError names it at the end."""
    context, pipes, processes, failed = multiprocessing.get_context("spawn"), {}, {}, []
    for name, job in jobs.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_child, args=(job, theirs), name=name)
        processes[name].start()
        theirs.close()  # else a child's end would go unnoticed
    for pipe in pipes.values():
        with suppress(EOFError):
            pipe.recv()
    for name, pipe in pipes.items():
        try:
            pipe.send(None)
            yield name, pipe.recv()
        except (EOFError, BrokenPipeError):
            failed.append(name)
        processes[name].join()
    if failed:
        raise RuntimeError(f"no result of {', '.join(failed)}: what they raised is printed above")


def _child(job: Job, pipe: Connection) -> None:
    """Also frees what the job holds, by ending, before the next one's turn."""
    steps = job()
    pipe.send(next(steps))
    pipe.recv()
    pipe.send(next(steps))
