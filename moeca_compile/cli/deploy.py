"""`moeca engines` and `triton`: a bundle made ready for NVIDIA's runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeca_compile.cli.params import BATCHES, Arch, Batches, BundlePath, Provider
from moeca_compile.cli.say import say
from moeca_compile.errors import OptionError
from moeca_compile.inspect.progress import bar
from moeca_compile.lowering.tensorrt.build import EngineRequest, build_engines
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.triton import write_repository


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (engines, triton):
        app.command()(command)


def engines(
    path: BundlePath,
    library: Annotated[str, typer.Option(help="tensorrt or tensorrt-rtx; else the one that is installed.")] = "",
    arch: Arch = "",
    batches: Batches = BATCHES,
    timing_cache: Annotated[Path | None, typer.Option(help="A file that keeps timings between builds.")] = None,
) -> None:
    """Build a TensorRT engine of each variant into the bundle."""
    request = request_of(library, arch, batches, timing_cache)
    with bar(True) as tick:
        bundle = build_engines(Bundle.open(path), request, tick)
    show_engines(bundle)


def triton(
    path: BundlePath,
    directory: Annotated[Path, typer.Argument(help="The model repository; made if it isn't there.")],
    name: Annotated[str, typer.Option(help="The model's name; by default the bundle's.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="The batch of all requests to the fused model.")] = 1,
    sequences: Annotated[int, typer.Option(min=1, help="How many trajectories run at a time, at most.")] = 64,
    idle_seconds: Annotated[int, typer.Option(min=1, help="A sequence without requests for so long is dropped.")] = 60,
    provider: Provider = "CPUExecutionProvider",
    threads: Annotated[int, typer.Option(min=0, help="How many threads an operator uses; 0: the runtime chooses.")] = 0,
) -> None:
    """Write a bundle as models of a Triton server."""
    models = write_repository(
        Bundle.open(path), directory, name, batch=batch, sequences=sequences, idle_seconds=idle_seconds,
        provider=provider, threads=threads,
    )  # fmt: skip
    for folder in models:
        say(folder)
    say(f"serve with: tritonserver --model-repository={directory}")


def request_of(library: str = "", arch: str = "", batches: str = BATCHES, cache: Path | None = None) -> EngineRequest:
    """What the options say.

    Raises:
        OptionError: batches that aren't three numbers.
    """
    try:
        least, usual, largest = map(int, batches.split(","))
    except ValueError:
        raise OptionError(f"--batches {batches}: expected three numbers, as in {BATCHES}") from None
    return EngineRequest(library, tuple(filter(None, arch.split(","))), (least, usual, largest), cache)


def show_engines(bundle: Bundle) -> None:
    for engine in bundle.manifest.engines:
        say(f"{engine.file}: {bundle.manifest.files[engine.file].bytes / 2**20:.1f} MiB, {engine.range}")
