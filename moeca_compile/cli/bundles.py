"""`moeca export`, `verify`, `info`, `run` and `bench`: bundles, at the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.table import Table

from moeca_compile.cli import deploy
from moeca_compile.cli.load import call
from moeca_compile.cli.params import BATCHES, Arch, AsJson, Batches, BundlePath, Memory, Provider, Threads
from moeca_compile.cli.say import print_json, say, show
from moeca_compile.errors import BundleError, OptionError
from moeca_compile.lowering.experts.choose import FORMS
from moeca_compile.options import Options
from moeca_compile.runtime.bundle.bench import bench_bundle
from moeca_compile.runtime.bundle.bundle import Bundle, engine_file
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.summary import VARIANT_COLUMNS, facts, variants
from moeca_compile.runtime.bundle.verify import verify as verify_session
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.session import Session


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (export, verify, info, run, bench):
        app.command()(command)


def export(
    source: Annotated[
        str, typer.Argument(help="package.module:function; it returns (model, example_inputs), more sizes after them.")
    ],
    path: Annotated[Path, typer.Argument(help="The directory to make.")],
    schedule: Annotated[str, typer.Option(help="A schedule's JSON file or a short form.")] = "uniform:3",
    order: Annotated[
        int | None, typer.Option(help="The forecast's order, for a short form: 0, 1 or 2; by default 1.")
    ] = None,
    granularity: Annotated[str, typer.Option(help="What the schedule's columns are.")] = "region",
    targets: Annotated[
        str, typer.Option(help="What is to run it, by commas: onnx, openvino, cuda, tensorrt.")
    ] = "onnx",
    experts: Annotated[str, typer.Option(help="auto, segments, dense, moe, capacity or capacity:1.25.")] = "auto",
    opset: Annotated[int, typer.Option(help="The ONNX opset of the graphs, 18 to 22.")] = 20,
    fused: Annotated[bool, typer.Option("--fused", help="Also write fused.onnx, all variants in one graph.")] = False,
    fixed_batch: Annotated[bool, typer.Option(help="Only for the example's batch; by default for any.")] = False,
    arch: Arch = "",
    batches: Batches = BATCHES,
    triton: Annotated[Path | None, typer.Option(help="Write a Triton model repository of it there too.")] = None,
) -> None:
    """Write a model and a schedule as a bundle; for tensorrt with its engines."""
    asked = deploy.request_of(arch=arch, batches=batches)
    _refuse_early(path, schedule, order, targets.split(","))
    model, inputs, *other_sizes = _load(source)
    from moeca_compile.exporting import export as export_model

    bundle = export_model(
        model, inputs, schedule, path, other_sizes=other_sizes, targets=targets.split(","), opset=opset,
        experts=experts, order=order, granularity=granularity, fused=fused, dynamic_batch=not fixed_batch,
        progress=True, engines=asked if arch or batches != BATCHES else None,
    )  # fmt: skip
    say(f"{path}: {len(bundle.graphs)} variants, {bundle.bytes / 2**20:.1f} MiB")
    if "tensorrt" in bundle.manifest.targets:
        deploy.show_engines(bundle)
    if triton is not None:
        deploy.triton(bundle.path, triton)


def verify(
    path: BundlePath,
    provider: Provider = CPU,
    memory: Memory = "speed",
    threads: Threads = None,
    fused: Annotated[bool, typer.Option("--fused", help="Run the fused graph in place of the variants.")] = False,
    json: AsJson = False,
) -> None:
    """Checksums, then the golden steps on this machine; exit status 1 if they differ from what was recorded."""
    kind = FusedSession if fused else Session
    session = kind.open(path, provider, memory, threads)
    for engine in session.manifest.engines:  # those too that this machine has no use for
        engine_file(path, engine, session.manifest)
    verdict = verify_session(session)
    if json:
        print_json({**asdict(verdict), "error": verdict.error, "passed": verdict.passed})
    else:
        say(verdict)
    raise typer.Exit(0 if verdict.passed else 1)


def info(path: BundlePath, json: AsJson = False) -> None:
    """What is in a bundle; its checksums are verified."""
    bundle = Bundle.open(path)
    if json:
        print_json(msgspec.to_builtins(bundle.manifest))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(bundle).items():
        table.add_row(name, value)
    every = Table(*VARIANT_COLUMNS)
    for line in variants(bundle):
        every.add_row(*line)
    show(table, every)


def run(
    path: BundlePath,
    inputs: Annotated[Path, typer.Option(help=".npz: for each input an array with a leading axis of steps.")],
    out: Annotated[Path, typer.Option(help=".npz for the outputs, with the same leading axis.")],
    provider: Provider = CPU,
    memory: Memory = "speed",
    threads: Threads = None,
) -> None:
    """Run one trajectory over recorded inputs."""
    session = Session.open(path, provider, memory, threads)
    try:
        with np.load(inputs, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError) as error:
        raise BundleError(f"{inputs} can't be read: {error}") from error
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise BundleError(f"{inputs}: every input needs the same number of steps, not {sorted(lengths)}")
    results: list[dict[str, Any]] = []
    with session.trajectory() as trajectory:
        for step in range(lengths.pop()):
            results.append(trajectory.run({name: array[step] for name, array in arrays.items()}))  # noqa: PERF401
        stats = trajectory.stats()
    stacked: dict[str, Any] = {name: np.stack([outputs[name] for outputs in results]) for name in results[0]}
    with out.open("wb") as file:  # as it is called: numpy would add .npz
        np.savez(file, **stacked)
    say(stats)


def bench(
    path: BundlePath,
    providers: Annotated[str, typer.Option(help="Execution providers of onnxruntime, or openvino; by commas.")] = CPU,
    steps: Annotated[int, typer.Option(min=1, help="How many steps a trajectory has.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Whole trajectories, cached and full in turn.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a call.")] = 2,
    memory: Memory = "speed",
    threads: Threads = 1,
    json: AsJson = False,
) -> None:
    """Milliseconds of each variant, and of whole trajectories with and without the cache."""
    figures = [
        bench_bundle(Session.open(path, provider, memory, threads), steps=steps, rounds=rounds, batch=batch)
        for provider in providers.split(",")
    ]
    if json:
        print_json([asdict(figure) for figure in figures])
        return
    for figure in figures:
        table = Table("variant", "ms a step", title=figure.provider, title_justify="left")
        for name, ms in figure.variant_ms.items():
            table.add_row(name, f"{ms:.2f}")
        show(table)
        say(
            f"{steps} steps: {figure.full_ms:.0f} ms full, {figure.cached_ms:.0f} ms cached, "
            f"{figure.speedup:.2f} times faster at {figure.mac_fraction:.1%} of the MACs "
            f"({figure.speedup * figure.mac_fraction:.0%} of what that allows)"
        )


def _refuse_early(path: Path, schedule: str, order: int | None, targets: list[str]) -> None:
    """What is wrong whatever the model is, before torch is imported, which takes seconds."""
    if path.exists():
        raise BundleError(f"{str(path)!r} exists already; remove it, or export to another name")
    if unknown := [name for name in targets if name not in FORMS]:
        raise OptionError(f"--targets {','.join(unknown)}: expected one or several of {', '.join(FORMS)}")
    Options(schedule=schedule, order=order).resolved_schedule()


def _load(source: str) -> tuple[Any, ...]:
    """The model and its example inputs, of one size or several, from `package.module:function`."""
    returned = call(source)
    if not isinstance(returned, tuple) or len(returned) < 2:
        raise OptionError(f"{source}: expected a function that returns (model, example_inputs)")
    return returned
