"""How anything is measured here: interleaved, repeated, one thread, with the machine on record.

    timings = interleave({"eager": f, "compiled": g}, rounds=10)
    print_table("one step", timings, baseline="eager")
    save("steps", {"timings": as_json(timings, baseline="eager")})

The protocol in words: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "moeca-compile", "diffusers", "cache-dit", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Timing:
    """The milliseconds of one contender, one value a round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def speedup(self, baseline: Timing) -> float:
        """Median over the rounds of baseline / self: both halves of each ratio were measured side by side."""
        return statistics.median(base / own for base, own in zip(baseline.ms, self.ms, strict=True))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time the contenders A B C A B C ...: a slow spell of the machine meets all of them alike.

    `before[name]`, if given, runs untimed ahead of each call of that contender. `warmup` rounds are thrown away.
    """
    before = before or {}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with collecting_between():
        for round_index in range(-warmup, rounds):
            for name, run in contenders.items():
                if name in before:
                    before[name]()
                started = time.perf_counter()
                run()
                elapsed = 1000 * (time.perf_counter() - started)
                if round_index >= 0:
                    samples[name].append(elapsed)
            gc.collect()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def in_step(walks: Mapping[str, Callable[[], Iterator[object]]], *, rounds: int) -> dict[str, Timing]:
    """Time trajectories that walk side by side, a step of each in turn: what is long is compared within the same
    moments too. A value is the sum over all steps of one trajectory."""
    samples: dict[str, list[float]] = {name: [] for name in walks}
    with collecting_between():
        for _ in range(rounds):
            walking = {name: begin() for name, begin in walks.items()}
            spent = dict.fromkeys(walks, 0.0)
            while walking:
                for name, walk in list(walking.items()):
                    started = time.perf_counter()
                    if next(walk, None) is None:
                        del walking[name]
                    spent[name] += 1000 * (time.perf_counter() - started)
            for name, value in spent.items():
                samples[name].append(value)
            gc.collect()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


@contextmanager
def collecting_between() -> Iterator[None]:
    """Python's collector runs between rounds and not within."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def pin_threads(threads: int = 1) -> None:
    """Use that many threads for torch: on shared cores more threads make the figures noise."""
    import torch

    torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, its vector instructions, cores, load, versions."""
    import torch

    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": " ".join(["python", "-m", "benchmarks." + _program(Path(sys.argv[0])), *_words(sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _words(words: Sequence[str]) -> list[str]:
    """A command's words without the folders of its results and finished work: they change no figure."""
    folders = ("--out", "--work", "--fitted", "--peers")
    return [word for before, word in zip(["", *words], words, strict=False) if not {word, before} & set(folders)]


def when(machine: Mapping[str, Any]) -> str:
    """The date of a measurement, and the commit of the code, or of its record where that is all that is known."""
    commit = machine.get("commit")
    return f"{machine['date']}, commit {commit}" if commit else str(machine["date"])


def _commit() -> str | None:
    """The commit that is checked out, with a plus sign where files other than results were changed since."""

    def git(*told: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *told], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = commit and git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results").returncode
    return commit + "+" * bool(changed) or None


def as_json(timings: Mapping[str, Timing], baseline: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median_ms": round(timing.median, 3),
            "min_ms": round(min(timing.ms), 3),
            "max_ms": round(max(timing.ms), 3),
            "rounds": len(timing.ms),
            "speedup": round(timing.speedup(timings[baseline]), 4),
        }
        for name, timing in timings.items()
    }


def print_table(title: str, timings: Mapping[str, Timing], baseline: str) -> None:
    table = Table("contender", title=title, title_justify="left")
    for column in ("median ms", "min", "max", f"× {baseline}"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        cells = (f"{timing.median:.1f}", f"{min(timing.ms):.1f}", f"{max(timing.ms):.1f}")
        table.add_row(name, *cells, f"{timing.speedup(timings[baseline]):.3f}")
    Console().print(table)


def arguments(description: str, quick: str) -> argparse.ArgumentParser:
    """A benchmark's options; `quick`: what it makes small under `--quick`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the result; default benchmarks/results, none with --quick")
    return parser


def folder_of(args: argparse.Namespace) -> Path | None:
    """Where the result goes; None: nowhere."""
    out: Path | None = args.out
    return out or (None if args.quick else RESULTS)


def save(name: str, payload: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write the payload and the machine to `<directory>/<name>.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **payload}, indent=2) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _program(file: Path) -> str:
    """peers.equal for benchmarks/peers/equal/__main__.py, steps for benchmarks/steps.py."""
    folders = file.parts[file.parts.index("benchmarks") + 1 : -1] if "benchmarks" in file.parts else ()
    return ".".join(folders if file.stem == "__main__" else (*folders, file.stem))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
