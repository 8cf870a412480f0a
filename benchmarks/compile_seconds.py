"""Seconds from the model to its first result, compilers' caches empty: one measurement, so one process.

    python -m benchmarks.compile_seconds plain --depth 12
    python -m benchmarks.compile_seconds moeca --depth 12

`plain` compiles the prepared model with torch.compile; `moeca` compiles every variant of uniform:3, equal blocks once;
`each` compiles each block for itself. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
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


def fresh(contender: str, depth: int) -> dict[str, Any]:
    """Measure in a new process with an empty Inductor cache."""
    command = [sys.executable, "-m", "benchmarks.compile_seconds", contender, "--depth", str(depth)]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


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
