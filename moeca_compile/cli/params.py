"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moeca_compile.errors import OptionError

BATCHES = "1,2,8"
CPU = "CPUExecutionProvider"
NAMED = "MODULE:FUNCTION"


def drawable(picture: Path | None) -> Path | None:
    """Refuse a picture that can't be drawn, before the work that it would show."""
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise OptionError(f"{picture}: a picture's name ends in .png or .svg")
    if picture is not None and not picture.resolve().parent.is_dir():
        raise OptionError(f"{picture}: there is no folder {picture.parent}")
    return picture


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", callback=drawable, help="Draw this into a .png or .svg file.")
]
Schedule = Annotated[
    str, typer.Option(help="The schedule: a JSON file, or a short form such as full, uniform:3 or uniform:3:warmup=4.")
]

# of a model
Model = Annotated[
    str,
    typer.Argument(
        metavar=NAMED,
        help="A function without arguments, as in my.models:build, that returns (model, example_inputs). A command "
        "that samples uses the model alone, and the function may then return just the model.",
    ),
]
Sample = Annotated[
    str, typer.Option(metavar=NAMED, help="A function that takes (model, seed) and returns the samples of that seed.")
]
Weights = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Load this .safetensors file first.")
]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds are sampled: 0, 1, ...")]
Inner = Annotated[
    Literal["inductor", "eager"],
    typer.Option(help="What runs the model: inductor compiles it, eager runs one operator after the other."),
]

# of a bundle
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that `moeca export` wrote.")]
Provider = Annotated[
    str,
    typer.Option(help="What runs the graphs: an execution provider of onnxruntime, openvino, or tensorrt."),
]
Memory = Annotated[
    Literal["speed", "shared"],
    typer.Option(help="Prefer speed, or one shared copy of the weights for all variants, which takes less memory."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="How many threads an operator uses; by default the runtime chooses.")
]
Arch = Annotated[
    str,
    typer.Option(help="Build engines for these GPUs, as in sm_89,sm_120. TensorRT builds for the GPU here."),
]
Batches = Annotated[str, typer.Option(help="The least, the usual and the largest batch of the engines.")]
