"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BATCHES = "1,2,8"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Picture = Annotated[Path | None, typer.Option(help="Draw into this .png or .svg.")]

# of a model that is sampled
Sample = Annotated[str, typer.Option(help="package.module:function; it takes (model, seed) and returns the samples.")]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file to load into the model.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds are sampled: 0, 1, ...")]
Inner = Annotated[str, typer.Option(help="inductor or eager.")]

# of a bundle
BundlePath = Annotated[Path, typer.Argument(help="A bundle's directory.")]
Provider = Annotated[str, typer.Option(help="An execution provider of onnxruntime, openvino, or tensorrt.")]
Memory = Annotated[str, typer.Option(help="speed, or shared: one copy of the weights for all variants.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of an operator; by default the runtime chooses.")]
Arch = Annotated[str, typer.Option(help="For which GPUs, by commas: sm_89,sm_120. TensorRT builds for the one here.")]
Batches = Annotated[str, typer.Option(help="The least, the usual and the largest batch.")]
