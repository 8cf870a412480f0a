"""`moeca calibrate` and `moeca plan`: schedules for a budget, at the command line."""

from __future__ import annotations

import json as json_text
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moeca_compile.cli.load import load
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.inspect import drift as lines
from moeca_compile.inspect import plots, schedules

Source = Annotated[str, typer.Argument(help="package.module:function; it returns the model.")]
Sample = Annotated[str, typer.Option(help="package.module:function; it takes (model, seed) and returns the samples.")]
Budget = Annotated[str, typer.Option(help="macs:0.26, latency:0.4, psnr:45, state:64MiB; several by commas.")]
Out = Annotated[Path, typer.Option(help="The schedule's JSON file to write.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file to load into the model.")]
Order = Annotated[str, typer.Option(help="Of the forecasts: 0, 1, 2 or auto.")]
Granularity = Annotated[str, typer.Option(help="region, stack, blocks:2:-2, skip:1 or auto.")]
Seeds = Annotated[int, typer.Option(help="How many seeds the search sees: 0, 1, ...")]
Holdout = Annotated[int, typer.Option(help="How many seeds only the final check sees: 1000, 1001, ...")]
Inner = Annotated[str, typer.Option(help="inductor or eager.")]
Kept = Annotated[Path, typer.Option(help="The folder that an earlier calibration kept.")]
Resume = Annotated[Path | None, typer.Option(help="A folder that keeps what is found, to go on from or plan again.")]
Perturb = Annotated[int, typer.Option(help="Experts to make stale one by one, at most; each costs two trajectories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the schedule's facts as JSON and nothing else.")]


def mount(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (calibrate, plan, drift):
        app.command()(command)


def calibrate(
    source: Source,
    sample: Sample,
    budget: Budget,
    out: Out,
    weights: Weights = None,
    order: Order = "auto",
    granularity: Granularity = "auto",
    seeds: Seeds = 8,
    holdout: Holdout = 2,
    inner: Inner = "inductor",
    resume: Resume = None,
    perturb: Perturb = 0,
    json: AsJson = False,
) -> None:
    """Find the best schedule that a budget allows, by sampling the model."""
    from moeca_compile.study import calibrate as find

    if perturb and not json:
        print(f"at most {perturb} experts are made stale, for about {2 * perturb} uncached trajectories")
    found = find(
        _weighted(load(source)(), weights),
        load(sample),
        budget=budget,
        order=int(order) if order.isdecimal() else order,
        granularity=granularity,
        seeds=range(seeds),
        holdout=range(1000, 1000 + holdout),
        inner=inner,
        resume=resume,
        perturb=perturb,
        progress=not json,
    )
    found.save(out)
    if json:
        print(json_text.dumps(schedules.facts(found), indent=1))
        return
    console = Console(highlight=False)
    for part in (schedules.table_of_facts(found), "", schedules.grid(found)):
        console.print(part)


def plan(
    source: Source,
    sample: Sample,
    budget: Budget,
    out: Out,
    resume: Kept,
    weights: Weights = None,
    order: Order = "auto",
    granularity: Granularity = "auto",
    seeds: Seeds = 8,
    holdout: Holdout = 2,
    inner: Inner = "inductor",
    json: AsJson = False,
) -> None:
    """Another budget, from what a calibration kept: nothing is measured again, only new plans are sampled."""
    if not any(resume.rglob("drift.npz")):  # a folder for each granularity
        raise ScheduleError(f"{resume} holds no calibration: run `moeca calibrate --resume {resume}` first")
    calibrate(source, sample, budget, out, weights, order, granularity, seeds, holdout, inner, resume, json=json)


def drift(
    kept: Annotated[Path, typer.Argument(help="The folder that a calibration kept.")],
    picture: Annotated[Path | None, typer.Option(help="Draw drift by step into this .png or .svg.")] = None,
    experts: Annotated[Path | None, typer.Option(help="Draw drift by expert into this .png or .svg.")] = None,
    json: AsJson = False,
) -> None:
    """How far each step, and each expert, is from what a forecast would give; as a calibration measured it."""
    from moeca_compile.study.store import Store

    file = next(iter(sorted(kept.rglob("drift.npz"))), None)
    store = Store(file.parent) if file is not None else None
    found = store.drift() if store is not None else None
    if store is None or found is None:
        raise ScheduleError(f"{kept} holds no calibration: `moeca calibrate --resume {kept}` makes one")
    measured, noted = found
    split = store.drift(name="split")
    steps: dict[str, list[float]] = {}
    for one in (*((split[0],) if split is not None else ()), measured):
        groups = [f"regions {', '.join(map(str, atom))}" for atom in one.atoms]
        steps |= lines.by_step(one.steps, one.pairs, one.parts, groups)
    layers = lines.by_expert(noted.get("experts", ()))
    stale = lines.by_harm(map(asdict, store.harms()))
    if picture is not None:
        plots.save(plots.drift_map(steps, "how far the latent is moved by older outputs"), picture)
    if experts is not None:
        plots.save(plots.drift_map(layers, "forecast drift of each expert's gated output", "expert"), experts)
    if json:
        print(json_text.dumps({"steps": steps, "experts": layers, "stale": stale}, indent=1).replace("NaN", "null"))
        return
    console = Console(highlight=False)
    for title, axis, found_lines in (
        ("drift by step", "step", steps),
        ("drift by expert", "expert", layers),
        ("PSNR in dB with one expert stale", "expert", stale),
    ):
        table = Table(title, "least", "median", "most", "where it is most", box=None, padding=(0, 2, 0, 0))
        for name, line in found_lines.items():
            known = {at: value for at, value in enumerate(line) if value == value}
            low, middle, high = (f(known.values()) for f in (min, statistics.median, max))
            most = max(known, key=known.__getitem__)
            table.add_row(name, f"{low:.3g}", f"{middle:.3g}", f"{high:.3g}", f"{axis} {most}")
        if found_lines:
            console.print(table)


def _weighted(model: Any, weights: Path | None) -> Any:
    """The model in eval mode, with the weights of a file in the dtype that it has."""
    if weights is not None:
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(weights))
        except (OSError, RuntimeError) as error:
            raise OptionError(f"{weights} can't be loaded into {type(model).__name__}: {error}") from error
    return model.eval().requires_grad_(False)
