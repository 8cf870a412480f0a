"""`weights.bin`: what the graphs of a bundle hold in constants, once, wherever and under whatever name it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeca_compile.runtime.bundle.manifest import WEIGHTS

SMALLEST = 256  # bytes; what is smaller stays in the graph
PAGE, LINE = 4096, 64
PAGED = 1 << 18  # bytes; from here on a tensor begins a page, for mapping; below, a page's end lost would weigh more


def externalise(models: Sequence[Any], folder: Path) -> int:
    """Write the large initializers of these onnx_ir models to `folder/weights.bin`, and make them references.

    Returns:
        The bytes of the tensors in it, without the gaps.
    """
    import onnx_ir as ir

    places: dict[tuple[Any, ...], tuple[int, int]] = {}
    total = 0
    with (folder / WEIGHTS).open("wb") as file:
        for model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < SMALLEST:
                    continue
                raw = tensor.tobytes()
                key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw).digest())
                if key not in places:
                    file.seek(-file.tell() % (PAGE if len(raw) >= PAGED else LINE), 1)
                    places[key] = file.tell(), len(raw)
                    file.write(raw)
                    total += len(raw)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=str(folder)
                )
    return total
