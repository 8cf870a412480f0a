"""`moeca compare`: how much faster a schedule makes a model, a pipeline or a bundle, and what that costs in quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeca_compile.cli import named
from moeca_compile.cli.command import add
from moeca_compile.cli.load import load, model_of
from moeca_compile.cli.params import CPU, NAMED, AsJson, Inner, Picture, Provider, Seeds, Threads, Weights
from moeca_compile.cli.say import print_json, say
from moeca_compile.errors import OptionError
from moeca_compile.options import Options
from moeca_compile.runtime.bundle.manifest import MANIFEST

DEFAULT_SCHEDULE = "uniform:3"

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION|BUNDLE",
        help="A function without arguments that returns a model, (model, example_inputs) or a pipeline; or the folder "
        "of a bundle.",
    ),
]
Sample = Annotated[
    str | None,
    typer.Option(
        metavar=NAMED,
        help="A function that takes (model, seed) and returns the samples of that seed. For a bundle, model is a "
        "function of one step: it takes arrays by input name and returns arrays by output name.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="For a pipeline, in place of --sample: a text to draw. Give it again for more."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="With --prompt: how many steps the pipeline makes.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help=f"The schedule: a JSON file, or a short form; by default {DEFAULT_SCHEDULE}. A bundle has its own."
    ),
]
Granularity = Annotated[str | None, typer.Option(help="What the schedule's columns are; by default region.")]
TruthName = Annotated[
    Literal["uncached", "converged"],
    typer.Option(help="Also compare with the converged samples; the sample function then takes a keyword steps."),
]


def mount(app: typer.Typer) -> None:
    """Add the command to an app."""
    add(
        app, compare,
        example="moeca compare my.models:build --sample my.models:sample --schedule half.json --picture pairs.png",
        if_stopped="nothing was kept",
    )  # fmt: skip


def compare(
    source: Source,
    sample: Sample = None,
    prompt: Prompts = None,
    steps: Steps = None,
    schedule: Schedule = None,
    granularity: Granularity = None,
    seeds: Seeds = 4,
    truth: TruthName = "uncached",
    inner: Inner = "inductor",
    weights: Weights = None,
    provider: Provider = CPU,
    threads: Threads = None,
    picture: Picture = None,
    json: AsJson = False,
) -> None:
    """Measure what a schedule gains in speed and costs in quality.

    The same seeds are sampled by the model's own code, compiled with every step computed, and cached. The three take
    turns. A bundle has no code of the model, so the last two are compared.
    """
    is_bundle = (Path(source) / MANIFEST).exists()
    options = {"schedule": schedule, "granularity": granularity}
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_early(source, sample, prompt, steps, given, is_bundle)
    compared: Any
    if is_bundle:
        from moeca_compile.runtime.session import Session

        compared = Session.open(source, provider, threads=threads)
    else:
        from moeca_compile.api import compile as compile_model

        chosen: dict[str, Any] = {"schedule": DEFAULT_SCHEDULE, **given}
        compared = compile_model(model_of(source, weights), inner=inner, **chosen)
    from moeca_compile.comparison import compare as compare_model

    comparison = compare_model(
        compared,
        None if sample is None else load(sample),
        prompts=prompt or None,
        call=None if steps is None else {"num_inference_steps": steps},
        seeds=seeds,
        truth=truth,
        progress=not json,
    )
    if json:
        print_json(comparison.to_dict())
    else:
        say(comparison)
    if picture is not None:
        comparison.save_picture(picture)


def _refuse_early(
    source: str, sample: str | None, prompts: list[str] | None, steps: int | None, options: dict[str, Any],
    is_bundle: bool,
) -> None:  # fmt: skip
    """Refuse what is wrong whatever the model is, before torch is imported, which takes seconds."""
    if not is_bundle and Path(source).is_dir():
        raise OptionError(
            f"{source}: this folder is no bundle: it has no {MANIFEST}. Expected MODULE:FUNCTION, or a folder that "
            "`moeca export` wrote"
        )
    if not is_bundle and ":" not in source:
        raise OptionError(f"{source!r}: expected MODULE:FUNCTION, as in my.models:build, or the folder of a bundle")
    if not is_bundle:
        named.check(source, 0)
        Options(**options).resolved_schedule()
    elif options:
        raise OptionError(f"--{next(iter(options))}: a bundle has its own. Export another bundle for another one")
    if (sample is None) == (not prompts):
        raise OptionError("give --sample MODULE:FUNCTION, or --prompt for a pipeline")
    if steps is not None and not prompts:
        raise OptionError("--steps is for the pipeline that --prompt calls; a sample function makes its own steps")
    if sample is not None:
        named.check(sample, 2)
