"""From the start of a process to its first image of digits: a saved package, and compiled with a warm Inductor cache.

    python -m benchmarks.first_image             # saves, warms, then 7 rounds of both in turn
    python -m benchmarks.first_image --rounds 3

Every start is a process of its own. It imports torch, makes the model callable, and samples one image with 50 steps.
The caches of files are warm in both ways: the processes before the first round aren't counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SCHEDULE = Path("examples/schedules/digits_34.json")
BATCH = 2  # one image: its conditional and its unconditional half
COMPILED, LOADED = "compiled, warm Inductor cache", "loaded package"


def compiled() -> None:
    """The first image of a process that compiles."""
    import moeca_compile as moeca
    from examples import digits

    model = moeca.compile(digits.load_model().requires_grad_(False), schedule=SCHEDULE)
    digits.sample(model, seed=0, n=1)


def loaded(folder: str) -> None:
    """The first image of a process that loads a package; the weights come with it."""
    import moeca_compile as moeca
    from examples import digits

    digits.sample(moeca.load(folder), seed=0, n=1)
    assert "torch._dynamo" not in sys.modules


def save(folder: Path) -> None:
    """Save the package."""
    import moeca_compile as moeca
    from examples import digits

    model = moeca.compile(digits.load_model().requires_grad_(False), schedule=SCHEDULE)
    example = torch.zeros(BATCH, 1, digits.SIZE, digits.SIZE), torch.zeros(BATCH), digits.labels_of(BATCH)
    print(moeca.save(model, folder, *example))


def seconds_of(*job: str, cache: Path) -> float:
    """Seconds of a process that runs one of the jobs, with an Inductor cache of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.first_image", "--job", *job], env=environment, check=True)
    return time.perf_counter() - begin


def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way, one of each in every round."""
    package, cache = folder / "digits", folder / "cache"
    print(f"save: {seconds_of('save', str(package), cache=cache):.1f} s")
    jobs = {COMPILED: ("compiled",), LOADED: ("loaded", str(package))}
    for name, job in jobs.items():
        print(f"{name}, first process: {seconds_of(*job, cache=cache):.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in sorted(jobs, reverse=bool(number % 2)):
            seconds[name].append(seconds_of(*jobs[name], cache=cache))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, *rest = options.job
        {"compiled": compiled, "loaded": loaded, "save": lambda path: save(Path(path))}[name](*rest)
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(options.rounds, Path(folder))
    print("| way | median s | fastest | slowest |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")


if __name__ == "__main__":
    main()
