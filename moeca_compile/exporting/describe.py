"""The part of the manifest that says what the graphs are."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from moeca_compile.dtypes import name_of
from moeca_compile.exporting.ranges import index_range
from moeca_compile.exporting.request import Captured
from moeca_compile.graph import fx
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.experts.choose import Lowering
from moeca_compile.lowering.experts.rewrite import calls
from moeca_compile.lowering.onnx.batch import Batches, dims
from moeca_compile.passes.transform.hoist import name_of as name_of_hoisted
from moeca_compile.runtime.bundle.dims import Dim
from moeca_compile.runtime.bundle.manifest import FORMAT, VERSION
from moeca_compile.schedule import Row
from moeca_compile.schedule.action import format_row, legend_of
from moeca_compile.schedule.granularity import OUTPUT

PACKAGES = ("moeca-compile", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def describe(
    captured: Sequence[Captured], size: int, shapes: Mapping[str, tuple[Dim, ...]], batches: Batches, experts: Lowering
) -> dict[str, Any]:
    """`captured`: at each of `batches`, or at one fixed batch; `size`: which of the bundle's sizes this is, from 0;
    `shapes`: of inputs and outputs by their ONNX names."""
    main = captured[0]
    program, names = main.program, main.names
    rows, variants = zip(*main.variants, strict=True)
    results = [fx.need(node) for node in fx.nodes_of(fx.output_node(variants[0].gm).args[0])]
    inputs = {entry.name: arg for entry, arg in zip(main.inputs, main.args, strict=True) if entry.name in names}
    ranges = _ranges(captured)
    timestep = None if program.timestep is None else names[main.inputs[program.timestep].name]
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": versions(),
        "model": {"fingerprint": program.regions.fingerprint, "regions": list(program.regions.keys)},
        "dtype": most_common_dtype(main.weights.values()),
        "expert_lowering": str(experts) if calls(variants[0].gm) else "none",
        "inputs": [
            _tensor(names[name], arg.dtype, shapes) | ranges.get(name, {})
            for name, arg in inputs.items()
            if names[name] in shapes
        ],
        "outputs": [_tensor(name, val.dtype, shapes) for (name, _), val in zip(main.results, results, strict=False)],
        "state": _state(captured, batches),
        "timestep": timestep if timestep in shapes else None,
        "variants": [_variant(row, variant, size, main, experts) for row, variant in main.variants],
        "steps": [rows.index(row) if row in rows else None for row in program.schedule.rows],
        **_of_output(main),
        **_of_prologues(main, size, shapes),
    }


def _of_output(main: Captured) -> dict[str, Any]:
    """What is said where the model's output is cached."""
    if main.program is main.network:
        return {}
    latent = main.program.latent
    return {"granularity": OUTPUT, "latent": None if latent is None else main.names[main.inputs[latent].name]}


def _of_prologues(main: Captured, size: int, shapes: Mapping[str, tuple[Dim, ...]]) -> dict[str, Any]:
    """What is said where hoisted values have graphs of their own."""
    hoisted, entries = [], []
    for prologue in main.prologues:
        variant, given = prologue.variant, [name_of_hoisted(position) for position in prologue.gives]
        results = fx.nodes_of(fx.output_node(variant.gm).args[0])
        for name, node in zip(given, results, strict=True):
            hoisted.append({"name": name, "dtype": name_of(fx.need(node).dtype), "shape": list(shapes[f"{name}_out"])})
        entries.append(
            {"per": prologue.per, "file": file_of(variant, size), "takes": _takes(main, variant),
             "hoists": [name_of_hoisted(position) for position in variant.hoists], "gives": given}
        )  # fmt: skip
    return {"hoisted": hoisted, "prologues": entries} if entries else {}


def _takes(main: Captured, variant: Variant) -> list[str]:
    """The inputs of a graph, by the names that people see."""
    return [main.names[main.inputs[i].name] for i in variant.takes if main.inputs[i].name in main.names]


def file_of(variant: Variant, size: int) -> str:
    return f"{variant.name}.onnx" if not size else f"size_{size}_{variant.name}.onnx"


def _variant(row: Row, variant: Variant, size: int, main: Captured, experts: Lowering) -> dict[str, Any]:
    layout = main.network.layout
    entry = {
        "name": variant.name,
        "file": file_of(variant, size),
        "row": format_row(row, legend_of(main.program.schedule.rows)),
        "takes": _takes(main, variant),
        "reads": [layout[slot].name for slot in variant.reads],
        "writes": [layout[slot].name for slot in variant.writes],
        "coefficients": variant.wants_coefficients,
        "counts_dropped": experts.name == "capacity" and bool(calls(variant.gm)),
        "macs": variant.macs,
    }
    if variant.wants_now:
        entry["now"] = True
    if variant.hoists:
        entry["hoists"] = [name_of_hoisted(position) for position in variant.hoists]
    return entry


def _state(captured: Sequence[Captured], batches: Batches) -> list[dict[str, Any]]:
    return [
        {
            "name": slots[0].name, "region": slots[0].region, "output": slots[0].output, "slot": slots[0].slot,
            "dtype": slots[0].dtype, "shape": list(dims([slot.shape for slot in slots], batches)),
        }
        for slots in zip(*(capture.program.layout for capture in captured), strict=True)
    ]  # fmt: skip


def _ranges(captured: Sequence[Captured]) -> dict[str, dict[str, list[int]]]:
    """Of inputs that index a table of the same size at every batch."""
    by_capture = []
    for capture in captured:
        graphs = [capture.variants[0][1], *(prologue.variant for prologue in capture.prologues)]
        inputs = [node for graph in graphs for node in fx.placeholders(graph.gm) if node.name in capture.names]
        by_capture.append(_narrowest((node.name, index_range(node)) for node in inputs))
    ranges = {}
    for name, limits in by_capture[0].items():
        if all(other.get(name) == limits for other in by_capture):
            ranges[name] = {"range": list(limits)}
    return ranges


def _narrowest(limits: Iterable[tuple[str, tuple[int, int] | None]]) -> dict[str, tuple[int, int]]:
    """The values that all graphs take which an input goes into."""
    by_name: dict[str, tuple[int, int]] = {}
    for name, limit in limits:
        if limit is not None:
            low, end = by_name.get(name, limit)
            by_name[name] = max(low, limit[0]), min(end, limit[1])
    return by_name


def _tensor(name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[Dim, ...]]) -> dict[str, Any]:
    return {"name": name, "dtype": name_of(dtype), "shape": list(shapes[name])}


def most_common_dtype(weights: Iterable[torch.Tensor]) -> str:
    """The floating dtype that most weights have, but for those of 8 bits, which nothing is computed in."""
    counted = Counter[str]()
    for weight in weights:
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            counted[name_of(weight.dtype)] += weight.numel()
    return counted.most_common(1)[0][0] if counted else "float32"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that an export is made with."""
    by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_name[name] = version(name)
        except PackageNotFoundError:
            by_name[name] = "not installed as a package"
    return by_name
