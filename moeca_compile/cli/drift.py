"""`moeca drift`: how a model changes from step to step, at the command line."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeca_compile.cli import named
from moeca_compile.cli.command import add
from moeca_compile.cli.load import load, model_of
from moeca_compile.cli.params import NAMED, AsJson, Inner, Picture, Seeds, Weights, drawable
from moeca_compile.cli.say import print_json, show
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.inspect.progress import bar

if TYPE_CHECKING:
    from moeca_compile.planner.store import Store

Of = Annotated[
    str,
    typer.Argument(
        metavar=f"FOLDER|{NAMED}",
        help="A folder that `moeca calibrate --resume` filled; with --sample, a function that returns the model.",
    ),
]
Sampled = Annotated[
    str | None,
    typer.Option(
        "--sample", metavar=NAMED, help="Run the model now, with this function that takes (model, seed) and samples."
    ),
]
Gap = Annotated[int, typer.Option(min=1, help="Compare each value with that of this many steps before.")]
Experts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=drawable, help="Draw the drift of each expert into a .png or .svg file."),
]


def mount(app: typer.Typer) -> None:
    """Add the command to an app."""
    add(
        app, drift,
        example="moeca drift my.models:build --sample my.models:sample --picture drift.svg",
        if_stopped="nothing was written",
    )  # fmt: skip


def drift(
    of: Of,
    sample: Sampled = None,
    weights: Weights = None,
    seeds: Seeds = 1,
    gap: Gap = 1,
    inner: Inner = "eager",
    picture: Picture = None,
    experts: Experts = None,
    json: AsJson = False,
) -> None:
    """Show how far each step is from what a cache would give.

    A folder that a calibration kept tells what was measured then. With --sample the model is sampled now, which also
    tells tokens, branches and experts apart.
    """
    if sample is None:
        if weights is not None or (seeds, gap, inner) != (1, 1, "eager"):
            raise OptionError("--weights, --seeds, --gap and --inner are for a model that is sampled now: add --sample")
        _calibrated(Path(of), picture, experts, json)
    else:
        _sampled(of, sample, weights, seeds, gap, inner, picture, experts, json)


def _sampled(
    source: str, sample: str, weights: Path | None, seeds: int, gap: int, inner: str,
    picture: Path | None, experts: Path | None, json: bool,
) -> None:  # fmt: skip
    named.check(source, 0)
    named.check(sample, 2)
    from moeca_compile.inspect import plots
    from moeca_compile.inspect.drift import plots as drift_plots
    from moeca_compile.inspect.drift import tables
    from moeca_compile.planner.drift.branches import branch_drift

    model, sampler = model_of(source, weights), load(sample)
    with bar(not json) as tick:
        drift = branch_drift(model, sampler, range(seeds), gap, inner, tick)
    title = f"{source}, {drift['steps']} steps, gap {gap}"
    if picture is not None:
        plots.save(drift_plots.by_layer(drift, title), picture)
    if experts is not None:
        plots.save(drift_plots.by_expert(drift, title), experts)
    if json:
        print_json(drift)
        return
    for table in tables.tables(drift["regions"]):
        show(table, "")
    apart = tables.not_told_apart(drift["regions"])
    if apart:
        show(f"as a whole only, for their branches can't be told apart: {', '.join(apart)}")


def _store_in(folder: Path) -> Store | None:
    """What a calibration stored in the folder, or in one below it; looked for before torch is imported."""
    file = next(iter(sorted(folder.rglob("drift.npz"))), None)
    if file is None:
        return None
    from moeca_compile.planner.store import Store

    return Store(file.parent)


def _calibrated(folder: Path, picture: Path | None, experts: Path | None, json: bool) -> None:
    from rich.table import Table

    from moeca_compile.inspect import plots
    from moeca_compile.inspect.drift import lines

    store = _store_in(folder)
    if store is None:
        raise _without_calibration(folder)
    from moeca_compile.planner.measured import stored_drift

    drift = stored_drift(store)
    if drift is None:
        raise _without_calibration(folder)
    steps, extra = drift
    layers = lines.by_expert(extra.get("experts", ()))
    stale = lines.by_harm(map(asdict, store.perturbations()))
    if picture is not None:
        plots.save(plots.drift_map(steps, "how far the latent is moved by older outputs"), picture)
    if experts is not None:
        plots.save(plots.drift_map(layers, "forecast drift of each expert's gated output", "expert"), experts)
    if json:
        print_json({"steps": steps, "experts": layers, "stale": stale})
        return
    for title, axis, lines_by_name in (
        ("drift by step", "step", steps),
        ("drift by expert", "expert", layers),
        ("PSNR in dB with one expert stale", "expert", stale),
    ):
        table = Table(title, "least", "median", "most", "where it is most", box=None, padding=(0, 2, 0, 0))
        for name, line in lines_by_name.items():
            known = {at: value for at, value in enumerate(line) if value == value}
            low, middle, high = (f(known.values()) for f in (min, statistics.median, max))
            most = max(known, key=known.__getitem__)
            table.add_row(name, f"{low:.3g}", f"{middle:.3g}", f"{high:.3g}", f"{axis} {most}")
        if lines_by_name:
            show(table)


def _without_calibration(folder: Path) -> ScheduleError:
    return ScheduleError(f"{folder} holds no calibration: `moeca calibrate --resume {folder}` makes one")
