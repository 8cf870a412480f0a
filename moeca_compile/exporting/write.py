"""A bundle's graphs, weights, schedule and golden steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeca_compile.exporting.arrays import to_numpy
from moeca_compile.exporting.golden import Step, golden_steps
from moeca_compile.exporting.lower import Lowered
from moeca_compile.exporting.parameters import parameter_table
from moeca_compile.exporting.request import Captured
from moeca_compile.exporting.steps import step_table
from moeca_compile.lowering.onnx.fused import fuse
from moeca_compile.lowering.onnx.weights import externalise
from moeca_compile.lowering.tensorrt.operators import refuse_unsupported
from moeca_compile.runtime.bundle.manifest import FUSED, SCHEDULE, WEIGHTS, bundle_id, golden_file
from moeca_compile.runtime.writing import checksum


def write_graphs(
    folder: Path, models: Mapping[str, tuple[str, Any]], mains: Sequence[Captured], model: torch.nn.Module,
    targets: Sequence[str],
) -> str:  # fmt: skip
    """Write weights, schedule and graphs.

    Args:
        models: by file name, the letters of the row and the onnx_ir.Model.
        mains: of each size the capture that is written.
        model: the one captured.

    Returns:
        The bundle's id.

    Raises:
        LoweringError: TensorRT is a target, and a graph has an operator that it doesn't take.
    """
    graphs = [graph for _, graph in models.values()]
    parameter_table(model, mains, graphs, externalise(graphs, folder)).write(folder)
    mains[0].program.schedule.save(folder / SCHEDULE)
    identity = bundle_id(checksum(folder / SCHEDULE), checksum(folder / WEIGHTS))
    for name, (row, graph) in models.items():
        graph.metadata_props["moeca.row"] = row
        _write_graph(folder / name, graph, identity)
        if "tensorrt" in targets:
            refuse_unsupported((folder / name).read_bytes(), name)
    return identity


def write_fused(folder: Path, main: Captured, lowered: Lowered, identity: str) -> dict[str, Any]:
    """Write the fused graph out of the variants' models, which are used up. Its weights are in the file already.

    Returns:
        What the manifest says of it.

    Raises:
        LoweringError: the schedule has no table of steps.
    """
    program = main.program
    table = step_table(program.schedule, program.layout, len(program.regions))
    entries = list(zip(table.variants, table.coefficients, strict=True))
    variants = [model for _, model in lowered.models.values()]
    _write_graph(folder / FUSED, fuse(variants, lowered.entries, entries, table.period), identity)
    return {"file": FUSED, "steps": table.steps}


def write_golden_steps(folder: Path, mains: Sequence[Captured], model: torch.nn.Module) -> list[int]:
    """Run and write the golden steps of each size.

    Args:
        mains: of each size the capture that was written.
        model: the one captured.

    Returns:
        How many steps each size has.

    Raises:
        LoweringError: a captured graph computes something else than the model.
    """
    counts = []
    for i, main in enumerate(mains):
        steps = golden_steps(main, model)
        _write_golden(folder / golden_file(i), steps)
        counts.append(len(steps))
    return counts


def _write_golden(path: Path, steps: Sequence[Step]) -> None:
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
