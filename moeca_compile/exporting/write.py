"""A bundle's graphs, weights, schedule and golden steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeca_compile.exporting.golden import Step
from moeca_compile.lowering.onnx.weights import externalise
from moeca_compile.runtime.bundle.bfloat16 import to_stored
from moeca_compile.runtime.bundle.manifest import FUSED, SCHEDULE, WEIGHTS, bundle_id
from moeca_compile.runtime.writing import checksum
from moeca_compile.schedule import Schedule


def write_graphs(folder: Path, models: Mapping[str, tuple[str, Any]], schedule: Schedule) -> str:
    """Write weights, schedule and graphs; `models`: (row, onnx_ir.Model) by file name. Returns the bundle's id."""
    externalise([model for _, model in models.values()], folder)
    schedule.save(folder / SCHEDULE)
    identity = bundle_id(checksum(folder / SCHEDULE), checksum(folder / WEIGHTS))
    for name, (row, model) in models.items():
        model.metadata_props["moeca.row"] = row
        _write_graph(folder / name, model, identity)
    return identity


def write_fused(folder: Path, model: Any, identity: str) -> None:
    """Write the fused graph; its weights are in the weights file already."""
    _write_graph(folder / FUSED, model, identity)


def write_golden(path: Path, steps: Sequence[Step]) -> None:
    arrays: dict[str, Any] = {}
    for side, name in enumerate(("input", "output")):
        for i in range(len(steps[0][side])):
            arrays[f"{name}_{i:03d}"] = np.stack([to_numpy(step[side][i]) for step in steps])
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _write_graph(file: Path, model: Any, identity: str) -> None:
    import onnx_ir as ir

    model.producer_name = "moeca-compile"
    model.metadata_props["moeca.id"] = identity
    file.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def to_numpy(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # numpy has no such type: its bits
        return tensor.detach().contiguous().view(torch.uint16).numpy()
    return to_stored(tensor.detach().numpy())
