"""`moeca engines` and `triton`: a bundle made ready for NVIDIA's runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeca_compile.cli.command import add
from moeca_compile.cli.params import BATCHES, CPU, Arch, AsJson, Batches, BundlePath, Provider
from moeca_compile.cli.say import print_json, say, say_next
from moeca_compile.errors import OptionError
from moeca_compile.inspect.progress import bar

if TYPE_CHECKING:
    from moeca_compile.lowering.tensorrt.build import EngineRequest
    from moeca_compile.runtime.bundle.bundle import Bundle

Library = Annotated[
    Literal["tensorrt", "tensorrt-rtx"] | None,
    typer.Option(help="Which library builds the engines; by default the one that is installed."),
]
TimingCache = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep timings of kernels in this file between builds.")
]
Repository = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The model repository; it is made if it isn't there.")
]


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    add(
        app, engines,
        example="moeca engines model.moeca --batches 1,2,8",
        if_stopped="{path} has the engines that it had before",
    )  # fmt: skip
    add(
        app, triton,
        example="moeca triton model.moeca models --sequences 64",
        if_stopped="{directory} may be incomplete: remove it, or run the command again",
    )  # fmt: skip


def engines(
    path: BundlePath,
    library: Library = None,
    arch: Arch = "",
    batches: Batches = BATCHES,
    timing_cache: TimingCache = None,
    json: AsJson = False,
) -> None:
    """Build a TensorRT engine of each variant into the bundle."""
    from moeca_compile.lowering.tensorrt.build import build_engines
    from moeca_compile.runtime.bundle.bundle import Bundle

    request = request_of(library or "", arch, batches, timing_cache)
    with bar(not json) as tick:
        bundle = build_engines(Bundle.open(path), request, tick)
    if json:
        print_json({"bundle": str(path), "engines": engine_facts(bundle)})
        return
    show_engines(bundle)
    say_next(f"moeca verify {path} --provider tensorrt")


def triton(
    path: BundlePath,
    directory: Repository,
    name: Annotated[str, typer.Option(help="The model's name on the server; by default the bundle's.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="The batch that all requests to the fused model have.")] = 1,
    sequences: Annotated[int, typer.Option(min=1, help="How many trajectories run at a time, at most.")] = 64,
    idle_seconds: Annotated[
        int, typer.Option(min=1, help="Drop a sequence after so many seconds without a request.")
    ] = 60,
    provider: Provider = CPU,
    threads: Annotated[int, typer.Option(min=0, help="How many threads an operator uses; 0: the runtime chooses.")] = 0,
    max_batch: Annotated[int, typer.Option(min=0, help="Sequences share calls of up to so many samples; 0: not.")] = 0,
    budget: Annotated[int, typer.Option(min=0, help="Bytes for the state of all sequences that share calls.")] = 0,
    json: AsJson = False,
) -> None:
    """Write a bundle as models of a Triton server."""
    from moeca_compile.runtime.bundle.bundle import Bundle

    models = written(
        Bundle.open(path), directory, name=name, batch=batch, sequences=sequences, idle_seconds=idle_seconds,
        provider=provider, threads=threads, max_batch=max_batch, budget=budget,
    )  # fmt: skip
    if json:
        print_json({"models": [str(folder) for folder in models]})
    else:
        show_models(models, directory)


def written(bundle: Bundle, directory: Path, **options: Any) -> tuple[Path, ...]:
    """The folders of a bundle's models, written to a repository. `options`: as `write_repository` takes them."""
    from moeca_compile.runtime.triton import write_repository

    return write_repository(bundle, directory, **options)


def show_models(models: Sequence[Path], directory: Path) -> None:
    for folder in models:
        say(folder)
    say_next(f"tritonserver --model-repository={directory}")


def request_of(library: str = "", arch: str = "", batches: str = BATCHES, cache: Path | None = None) -> EngineRequest:
    """What the options say.

    Raises:
        OptionError: batches that aren't three numbers.
    """
    from moeca_compile.lowering.tensorrt.build import EngineRequest

    try:
        least, usual, largest = map(int, batches.split(","))
    except ValueError:
        raise OptionError(f"--batches {batches}: expected three numbers, as in {BATCHES}") from None
    asked = (least, usual, largest) if batches != BATCHES else None  # a bundle may have a range of its own
    return EngineRequest(library, tuple(filter(None, arch.split(","))), asked, cache)


def engine_facts(bundle: Bundle) -> list[dict[str, Any]]:
    """File, bytes and batches of each engine of a bundle."""
    manifest = bundle.manifest
    return [
        {"file": engine.file, "bytes": manifest.files[engine.file].bytes, "range": engine.range}
        for engine in manifest.engines
    ]


def show_engines(bundle: Bundle) -> None:
    for engine in engine_facts(bundle):
        say(f"{engine['file']}: {engine['bytes'] / 2**20:.1f} MiB, {engine['range']}")
