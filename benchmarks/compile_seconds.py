"""Seconds from the model to its first result, compilers' caches empty: each measurement in a process of its own.

    python -m benchmarks.compile_seconds plain --depth 12
    python -m benchmarks.compile_seconds moeca --depth 12

`plain` compiles the prepared model with torch.compile; `moeca` compiles every variant of uniform:3, equal blocks once;
`each` compiles each block for itself. Prints JSON.

All of Inductor's caches are empty, or all but one: the header that every C++ kernel includes is compiled once for a
machine's torch, into a folder of its own under the temporary one, and takes 7 to 9 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

import moeca_compile as moeca
from benchmarks.models import example_inputs, network
from benchmarks.protocol import pin_threads

CONTENDERS = ("plain", "moeca", "each")


def fresh(contender: str, depth: int, header: bool) -> float:
    """Seconds in a new process with Inductor's caches empty; `header`: but for the compiled header."""
    command = [sys.executable, "-m", "benchmarks.compile_seconds", contender, "--depth", str(depth)]
    with tempfile.TemporaryDirectory() as folder:
        empty = {"TORCHINDUCTOR_CACHE_DIR": folder} | ({} if header else {"TMPDIR": folder})
        done = subprocess.run(command, env={**os.environ, **empty}, stdout=subprocess.PIPE, text=True, check=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def medians(contenders: Sequence[str], depths: Sequence[int], rounds: int, header: bool) -> dict[str, dict[str, float]]:
    """Median seconds by contender and depth, the contenders in turn."""
    found: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for depth in depths:
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, seconds in taken.items():
                seconds.append(fresh(name, depth, header))
        for name, seconds in taken.items():
            found[name][str(depth)] = statistics.median(seconds)
    return found


@torch.no_grad()
def measure(contender: str, depth: int) -> dict[str, Any]:
    model, inputs = network(depth), example_inputs()
    moeca.prepare(model)
    started = time.perf_counter()
    if contender == "plain":
        torch.compile(model)(*inputs)
    else:
        disable = ("repeat_blocks",) if contender == "each" else ()
        moeca.warmup(moeca.compile(model, schedule="uniform:3", order=1, disable=disable), *inputs)
    return {"contender": contender, "seconds": time.perf_counter() - started}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the network (default 12)")
    args = parser.parse_args(argv)
    pin_threads()
    print(json.dumps(measure(args.contender, args.depth)))


if __name__ == "__main__":
    main()
