"""`moeca export`, `verify`, `info`, `refit`, `run` and `bench`: bundles, at the command line.

What a command works with is imported inside it: help, completion and mistakes of other commands don't wait for numpy.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeca_compile.cli import deploy, named
from moeca_compile.cli.command import add
from moeca_compile.cli.load import model_and_inputs
from moeca_compile.cli.params import (
    BATCHES,
    CPU,
    Arch,
    AsJson,
    Batches,
    BundlePath,
    Memory,
    Model,
    Provider,
    Schedule,
    Threads,
)
from moeca_compile.cli.say import print_json, say, say_next, show
from moeca_compile.errors import BundleError, OptionError

if TYPE_CHECKING:
    from moeca_compile.runtime.packages.package import Package

Order = Annotated[
    int | None,
    typer.Option(min=0, max=2, help="The order of the forecasts of a short form, 1 by default. A file has its own."),
]
Granularity = Annotated[
    str, typer.Option(help="What a column of the schedule is: region, stack, blocks:2:-2, skip:1 or output.")
]
Targets = Annotated[
    str,
    typer.Option(
        help="What is to run the bundle: onnx, openvino, cuda or tensorrt, several with commas between; or aoti alone."
    ),
]
Experts = Annotated[
    str, typer.Option(help="How experts are written: auto, segments, dense, moe, capacity or capacity:1.25.")
]
Triton = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Also write a Triton model repository of the bundle there.")
]


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    add(
        app, export,
        example="moeca export my.models:build model.moeca --schedule half.json",
        if_stopped="no bundle was written to {path}",
    )  # fmt: skip
    add(app, verify, example="moeca verify model.moeca", if_stopped="the bundle is as it was")
    add(app, info, example="moeca info model.moeca --json", if_stopped="nothing was written")
    add(
        app, refit,
        example="moeca refit base.moeca tuned.safetensors tuned.moeca",
        if_stopped="no bundle was written to {out}",
    )  # fmt: skip
    add(
        app, run,
        example="moeca run model.moeca --inputs steps.npz --out outputs.npz",
        if_stopped="{out} wasn't written",
    )  # fmt: skip
    add(
        app, bench,
        example="moeca bench model.moeca --providers CPUExecutionProvider,openvino --steps 28",
        if_stopped="nothing was written",
    )  # fmt: skip


def export(
    source: Model,
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to make; it must not exist.")],
    schedule: Schedule = "uniform:3",
    order: Order = None,
    granularity: Granularity = "region",
    targets: Targets = "onnx",
    experts: Experts = "auto",
    opset: Annotated[int, typer.Option(min=18, max=24, help="The ONNX opset of the graphs.")] = 20,
    fused: Annotated[bool, typer.Option("--fused", help="Also write fused.onnx, all variants in one graph.")] = False,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Export for the example's batch alone; by default for any batch.")
    ] = False,
    arch: Arch = "",
    batches: Batches = BATCHES,
    triton: Triton = None,
    json: AsJson = False,
) -> None:
    """Write a model and a schedule as a bundle.

    A bundle runs without torch; for the target tensorrt it gets engines. The target aoti makes a package in its place:
    native code for the example's batch, which moeca_compile.load runs in torch without a compiler. The function returns
    (model, example_inputs); more example inputs after them become further sizes.
    """
    asked = deploy.request_of(arch=arch, batches=batches)
    _refuse_early(source, path, schedule, order, granularity, targets.split(","))
    model, inputs, *other_sizes = model_and_inputs(source)
    from moeca_compile.exporting import export as export_model
    from moeca_compile.runtime.packages.package import Package

    bundle = export_model(
        model, inputs, schedule, path, other_sizes=other_sizes, targets=targets.split(","), opset=opset,
        experts=experts, order=order, granularity=granularity, fused=fused,
        dynamic_batch=not fixed_batch and targets != "aoti",
        progress=not json, engines=asked if arch or batches != BATCHES else None,
    )  # fmt: skip
    if isinstance(bundle, Package):
        _show_package(bundle, json)
        return
    models = deploy.written(bundle, triton) if triton is not None else ()
    if json:
        print_json(
            {
                "bundle": str(path),
                "variants": len(bundle.graphs),
                "bytes": bundle.bytes,
                "engines": deploy.engine_facts(bundle),
                "models": [str(folder) for folder in models],
            }
        )
        return
    say(f"{path}: {len(bundle.graphs)} variants, {bundle.bytes / 2**20:.1f} MiB")
    deploy.show_engines(bundle)
    if triton is not None:
        deploy.show_models(models, triton)
    else:
        say_next(f"moeca verify {path}")


def _show_package(package: Package, json: bool) -> None:
    variants = len(package.manifest.sizes[0].variants)
    if json:
        print_json({"package": str(package.path), "variants": variants, "bytes": package.bytes})
        return
    say(f"{package.path}: {variants} variants, {package.bytes / 2**20:.1f} MiB")
    say_next(f"moeca info {package.path}")


def verify(
    path: BundlePath,
    provider: Provider = CPU,
    memory: Memory = "speed",
    threads: Threads = None,
    fused: Annotated[bool, typer.Option("--fused", help="Run the fused graph in place of the variants.")] = False,
    json: AsJson = False,
) -> None:
    """Verify a bundle on this machine.

    Its checksums first, then its golden steps; exit status 1 if they differ from what was recorded.
    """
    from moeca_compile.runtime.bundle.bundle import engine_file
    from moeca_compile.runtime.bundle.fused import FusedSession
    from moeca_compile.runtime.bundle.verify import verify as verify_session
    from moeca_compile.runtime.session import Session

    kind = FusedSession if fused else Session
    session = kind.open(path, provider, memory, threads)
    for engine in session.manifest.engines:  # those too that this machine has no use for
        engine_file(path, engine, session.manifest)
    verdict = verify_session(session)
    if json:
        print_json({**asdict(verdict), "error": verdict.error, "passed": verdict.passed})
    else:
        say(verdict)
        if verdict.passed:
            say_next(f"moeca bench {path} --providers {provider}")
    raise typer.Exit(0 if verdict.passed else 1)


def info(path: BundlePath, json: AsJson = False) -> None:
    """Show what is in a bundle or package; checksums are verified."""
    import msgspec
    from rich.table import Table

    from moeca_compile.runtime.bundle.bundle import Bundle
    from moeca_compile.runtime.bundle.summary import VARIANT_COLUMNS, facts, variants
    from moeca_compile.runtime.packages.package import Package, is_package

    if is_package(path):
        package = Package.open(path)
        if json:
            print_json(msgspec.to_builtins(package.manifest))
        else:
            say(package)
        return
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


def refit(
    path: BundlePath,
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="A .safetensors file with the names of the model's state dict.")
    ],
    out: Annotated[Path, typer.Argument(metavar="NEW", help="The folder to make; it must not exist.")],
    provider: Provider = CPU,
    json: AsJson = False,
) -> None:
    """Write a bundle with the same graphs and other weights.

    It needs neither the model nor torch. Weights that the file leaves out stay as they are, and share the disk space
    of the first bundle. The golden steps are run anew, by the provider.
    """
    from moeca_compile.runtime.bundle.bundle import Bundle
    from moeca_compile.runtime.bundle.manifest import CHANGED

    bundle = Bundle.open(path).with_weights(weights, out, provider=provider)
    entry = bundle.manifest.files.get(CHANGED)
    changed = entry.bytes if entry is not None else 0
    if json:
        print_json({"bundle": str(out), "bytes": bundle.bytes, "changed_bytes": changed})
        return
    say(f"{out}: {bundle.bytes / 2**20:.1f} MiB, of which {changed / 2**20:.1f} MiB are its own weights")
    say_next(f"moeca verify {out}")


def run(
    path: BundlePath,
    inputs: Annotated[
        Path, typer.Option(metavar="FILE", help="A .npz file: for each input an array with a leading axis of steps.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Write the outputs to this .npz, with the same axis first.")
    ],
    provider: Provider = CPU,
    memory: Memory = "speed",
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Run one trajectory over recorded inputs."""
    if not out.resolve().parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}")
    import numpy as np

    from moeca_compile.runtime.session import Session

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
    if json:
        print_json({"out": str(out), "steps": [asdict(record) for record in stats.steps]})
    else:
        say(stats)


def bench(
    path: BundlePath,
    providers: Annotated[
        str, typer.Option(help="Measure on these: execution providers of onnxruntime or openvino, with commas between.")
    ] = CPU,
    steps: Annotated[int, typer.Option(min=1, help="How many steps a trajectory has.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How many whole trajectories run, cached and full in turn.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="How many samples a call has.")] = 2,
    memory: Memory = "speed",
    threads: Threads = 1,
    json: AsJson = False,
) -> None:
    """Measure how fast a bundle is, with and without the cache.

    The milliseconds of each variant, and of whole trajectories, cached and full in turn.
    """
    from rich.table import Table

    from moeca_compile.runtime.bundle.bench import bench_bundle
    from moeca_compile.runtime.session import Session

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


def _refuse_early(
    source: str, path: Path, schedule: str, order: int | None, granularity: str, targets: list[str]
) -> None:
    """Refuse what is wrong whatever the model is, before torch is imported, which takes seconds."""
    from moeca_compile.lowering.experts.choose import FORMS
    from moeca_compile.options import Options

    named.check(source, 0)
    if path.exists():
        raise BundleError(f"{str(path)!r} exists already; remove it, or export to another name")
    if targets != ["aoti"] and (unknown := [name for name in targets if name not in FORMS]):
        raise OptionError(
            f"--targets {','.join(unknown)}: expected one or several of {', '.join(FORMS)}, or aoti by itself"
        )
    Options(schedule=schedule, order=order, granularity=granularity).resolved_schedule()
