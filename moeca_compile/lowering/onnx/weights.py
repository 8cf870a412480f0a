"""`weights.bin`: what the graphs of a bundle hold in constants, once, wherever and under whatever name it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeca_compile.dtypes import name_of
from moeca_compile.lowering.onnx.parameters import RECIPE
from moeca_compile.runtime.bundle.manifest import WEIGHTS
from moeca_compile.runtime.bundle.refit.parameters import StoredSpec
from moeca_compile.runtime.bundle.refit.places import append

SMALLEST = 256  # bytes; what is smaller stays in the graph


def externalise(models: Sequence[Any], folder: Path) -> list[StoredSpec]:
    """Write the large initializers of these onnx_ir models to `folder/weights.bin`, and make them references.

    Returns:
        The constants in it that are made of parameters. Each has a place of its own, whatever its values and size are.
    """
    import onnx_ir as ir

    places: dict[tuple[Any, ...], tuple[int, int]] = {}
    stored: list[StoredSpec] = []
    with (folder / WEIGHTS).open("wb") as file:
        for model in models:
            for value in model.graph.initializers.values():
                tensor, recipe = value.const_value, value.meta.get(RECIPE)
                if tensor is None or (recipe is None and tensor.nbytes < SMALLEST):
                    continue
                raw = tensor.tobytes() if recipe is None else b""
                key = recipe or (tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw).digest())
                if key not in places:
                    raw = raw or tensor.tobytes()
                    places[key] = append(file, raw), len(raw)
                    if recipe is not None:
                        dtype = name_of(tensor.raw.dtype)
                        stored.append(StoredSpec(WEIGHTS, places[key][0], dtype, tuple(tensor.shape), recipe))
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=str(folder)
                )
    return stored
