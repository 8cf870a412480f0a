"""What a graph of a bundle must take and give, and whether one that a runtime has loaded does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.manifest import (  # fmt: skip
    COEFFICIENTS,
    DROPPED,
    NOW,
    GraphSpec,
    Manifest,
    PrologueSpec,
    TensorSpec,
)
from moeca_compile.schedule.forecast import MAX_KEPT, Coefficients

Specs = dict[str, TensorSpec]
_WITH_DIFFERENCES = 2  # the last version of the format whose graphs take coefficients of differences


def signature_of(spec: GraphSpec, manifest: Manifest) -> tuple[Specs, Specs]:
    """A graph's inputs and outputs by their names in it. The outputs in order: of a variant the model's, what is
    written, the count of dropped branches; of a prologue what it gives."""
    state = {spec.name: spec for spec in manifest.state}
    inputs = {spec.name: spec for spec in manifest.inputs}
    hoisted = {spec.name: spec for spec in manifest.hoisted}
    takes: Specs = {name: inputs[name] for name in spec.takes}
    takes |= {f"{name}_in": hoisted[name] for name in spec.hoists}
    if isinstance(spec, PrologueSpec):
        return takes, {f"{name}_out": hoisted[name] for name in spec.gives}
    takes |= {f"{name}_in": state[name] for name in spec.reads}
    if spec.coefficients:
        takes[COEFFICIENTS] = coefficients_spec(manifest)
    if spec.now:
        takes[NOW] = TensorSpec(NOW, "float32", ())
    gives: Specs = {output.name: output for output in manifest.outputs}
    gives |= {f"{name}_out": state[name] for name in spec.writes}
    if spec.counts_dropped:
        gives[DROPPED] = TensorSpec(DROPPED, "int64", ())
    return takes, gives


def coefficients_spec(manifest: Manifest) -> TensorSpec:
    """The graphs' input of a forecast's coefficients."""
    columns = 2 if manifest.version <= _WITH_DIFFERENCES else MAX_KEPT
    return TensorSpec(COEFFICIENTS, "float32", (manifest.regions, columns))


def coefficients_of(manifest: Manifest, weights: Coefficients) -> Any:
    """The array for this input.

    A forecast is w0 y0 + w1 y1 + w2 y2 + w3 y3. Graphs of version 2 compute y0 + c0 (y0 - y1) + c1 (y1 - y2): the same
    sum with c0 = w0 - 1 and c1 = -w2, where the weights sum to 1 and w3 is 0, as those of their polynomials do.

    Args:
        weights: of each region.
    """
    table = np.asarray(weights, np.float64).reshape(manifest.regions, MAX_KEPT)
    if manifest.version <= _WITH_DIFFERENCES:
        table = np.stack([table[:, 0] - 1, -table[:, 2]], axis=1)
    return table.astype(np.float32)


def batch_of(takes: Mapping[str, TensorSpec], feeds: Mapping[str, Any]) -> int:
    """The batch that the arrays among the feeds have; 1 where nothing depends on it."""
    arrays = ((spec, feeds[name]) for name, spec in takes.items() if isinstance(feeds[name], np.ndarray))
    return max([1, *(spec.batch_of(array.shape) or 1 for spec, array in arrays)])


def check_identity(spec: GraphSpec, manifest: Manifest, carried: Mapping[str, str]) -> None:
    """Raises:
    BundleError: the graph's metadata is of another bundle or row.
    """
    expected = {"moeca.id": manifest.id, "moeca.row": spec.row}
    if {name: carried.get(name) for name in expected} != expected:
        raise BundleError(f"{spec.file} isn't variant {spec.name} of this bundle: it carries another id or row")


def check_side(
    file: str, side: str, expected: Mapping[str, TensorSpec], reported: Mapping[str, tuple[str, Sequence[Any]]]
) -> None:
    """Hold what a runtime says of a graph against the manifest.

    Args:
        side: "inputs" or "outputs".
        reported: dtype and sizes by name; a size that depends on the batch is its expression, or None where the runtime
            doesn't say more.

    Raises:
        BundleError: they differ.
    """
    if set(reported) != set(expected):
        raise BundleError(f"{file} has the {side} {sorted(reported)}, the manifest says {sorted(expected)}")
    for name, spec in expected.items():
        dtype, sizes = reported[name]
        fits = dtype == spec.dtype and len(sizes) == len(spec.shape)
        pairs = zip(sizes, spec.shape, strict=True) if fits else ()
        if not fits or not all(isinstance(b, str) if a is None else a == b for a, b in pairs):
            raise BundleError(f"{file}: {name} is {dtype} {list(sizes)}, the manifest says {spec}")


def check_shape(file: str, name: str, sizes: Sequence[int], expected: Sequence[int]) -> None:
    """Hold what a run gave against the manifest: not every runtime tells expressions of the batch before.

    Raises:
        BundleError: they differ.
    """
    if tuple(sizes) != tuple(expected):
        raise BundleError(f"{file} gives {name} with shape {list(sizes)}, the manifest says {list(expected)}")
