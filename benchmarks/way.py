"""How long the way through the package's code is: Python frames and files of one reused step, and of one compile.

    python -m benchmarks.way    # seconds; writes results/way.json

No time is measured: the counts are the same on every machine. A frame is a call of a function of the package; a change
of file is one in another file than the last. The model is two blocks of DiT-MoE with random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import moeca_compile as moeca
from benchmarks import models
from benchmarks.protocol import arguments, folder_of, pin_threads, save

PACKAGE = str(Path(moeca.__file__).parent)
WAYS = ("outside a trajectory", "a named stream", "a frozen trajectory")
STEPS = 12
REUSED = 7  # of uniform:3, in the second trajectory: nothing is built any more


@dataclass
class Counts:
    """What ran while it was counted: calls of the package's functions, their files, and steps from file to file."""

    frames: int = 0
    files: int = 0
    changes: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count in this thread until the block ends."""
    found, files, last = Counts(), set[str](), ""

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal last
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            found.frames += 1
            found.changes += name != last
            files.add(name)
            last = name

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)
        found.files = len(files)


def reused_step(model: Any, way: str) -> Counts:
    """Of one step that computes no region, in the second trajectory of its kind."""
    x, _, labels = models.example_inputs()
    found = Counts()
    for again in (False, True):
        named = way != WAYS[0]
        frozen = way == WAYS[2]
        inside = moeca.trajectory(model, steps=STEPS, stream="a" if named else None, frozen=frozen)
        with torch.no_grad(), inside if named else nullcontext():
            for step, time in enumerate(models.timesteps(STEPS)):
                t = torch.full((len(x),), time)
                with counted() if again and step == REUSED else nullcontext(Counts()) as counts:
                    model(x, t, labels)
                found = counts if counts.frames else found
    return found


def compiling(make: Callable[[], Any]) -> Counts:
    """Of one capture and all variants, without Inductor."""
    model = moeca.compile(make(), schedule="uniform:3", inner="eager")
    with counted() as found:
        moeca.warmup(model, *models.example_inputs())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments("frames and files of a reused step, and of one compile", "the same").parse_args(argv)
    pin_threads()

    def network() -> torch.nn.Module:
        return models.network(depth=2).eval().requires_grad_(False)

    rows = {"capture and build": compiling(network)}
    model = moeca.compile(network(), schedule="uniform:3", inner="eager")
    moeca.warmup(model, *models.example_inputs())
    rows |= {f"a reused step, {way}": reused_step(model, way) for way in WAYS}
    table = Table(title="Calls of the package's functions")
    for column in ("", "frames", "files", "changes of file"):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in rows.items():
        table.add_row(name, str(one.frames), str(one.files), str(one.changes))
    Console().print(table)
    folder = folder_of(args)
    if folder is not None:
        save("way", {name: vars(one) for name, one in rows.items()}, folder)


if __name__ == "__main__":
    main()
