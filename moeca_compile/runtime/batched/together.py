"""Running one graph for several requests at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.batched.joining import batch_axis, joined, split
from moeca_compile.runtime.bundle.manifest import GraphSpec, TensorSpec
from moeca_compile.runtime.bundle.signature import signature_of
from moeca_compile.runtime.providers.provider import Loaded
from moeca_compile.runtime.session import Session


class Signature(NamedTuple):
    """What joining and splitting needs to know of a graph.

    Attributes:
        takes: names of the inputs, and the axis of the samples; None: it doesn't depend on the batch.
        gives: for each output, this axis, and the size along it of one sample.
    """

    takes: tuple[tuple[str, int | None], ...]
    gives: tuple[tuple[int | None, int], ...]


class Together:
    """The graphs of a session, each for several requests in one call.

    Args:
        session: on a runtime whose values are in the host's memory.

    Attributes:
        shared: names of the inputs that don't depend on the batch; requests of one call have equal ones.
        axes: for each slot of the state, the axis along which samples lie.

    Raises:
        BundleError: requests can't share a call of this bundle.
    """

    def __init__(self, session: Session) -> None:
        manifest = session.manifest
        _refuse(session)
        self._session = session
        specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs, *manifest.hoisted)}
        axes = {name: batch_axis(spec) for name, spec in specs.items()}
        self.shared = tuple(spec.name for spec in manifest.inputs if axes[spec.name] is None)
        self.axes = []
        for tensor in (*manifest.outputs, *manifest.state):
            if (axis := batch_axis(tensor)) is None:
                raise BundleError(f"{tensor} doesn't depend on the batch: requests can't share a call. Use Session")
            if tensor in manifest.state:
                self.axes.append(axis)
        self._signatures: dict[str, Signature] = {}

    def run(self, loaded: Loaded, feeds: Sequence[Mapping[str, Any]], batches: Sequence[int]) -> list[list[Any]]:
        """Run a graph once.

        Args:
            loaded: the graph.
            feeds: for each request, what the graph takes.
            batches: for each request, its number of samples.

        Returns:
            For each request, the graph's values as arrays.
        """
        numpy, signature = self._session.runtime.numpy, self._signature(loaded.spec)
        together = {}
        for name, axis in signature.takes:
            values = [request[name] for request in feeds]
            if axis is None:
                together[name] = values[0]
            else:
                together[name] = np.ascontiguousarray(joined([numpy(value) for value in values], axis))
        parts: list[list[Any]] = []
        for (axis, size), value in zip(signature.gives, loaded.run(together), strict=True):
            array = numpy(value)
            parts.append([array] * len(feeds) if axis is None else split(array, axis, size, batches))
        return [list(values) for values in zip(*parts, strict=True)]

    def _signature(self, spec: GraphSpec) -> Signature:
        if spec.file not in self._signatures:
            takes, gives = signature_of(spec, self._session.manifest)
            self._signatures[spec.file] = Signature(
                tuple((name, batch_axis(tensor)) for name, tensor in takes.items()),
                tuple(map(_split_of, gives.values())),
            )
        return self._signatures[spec.file]


def _split_of(spec: TensorSpec) -> tuple[int | None, int]:
    axis = batch_axis(spec)
    return axis, 0 if axis is None else spec.sizes(1)[axis]


def _refuse(session: Session) -> None:
    """Raises:
    BundleError: requests can't share a call of this bundle, or not here.
    """
    manifest, runtime = session.manifest, session.runtime
    if not manifest.dynamic_batch:
        raise BundleError(
            "the bundle has one batch, so requests can't share a call: export it with dynamic_batch=True, or use "
            "Session"
        )
    if manifest.batch is not None and manifest.batch[0] > 1:
        raise BundleError(
            f"the bundle takes batches from {manifest.batch[0]} on, and a request may be alone in a call: export it "
            "for batches from 1 on, or use Session"
        )
    if any(variant.counts_dropped for variant in manifest.variants):
        raise BundleError(
            "the bundle's experts have a capacity, so the samples of a call take places from each other: export with "
            "experts='segments' or 'dense', or use Session"
        )
    if getattr(runtime, "device", "cpu") != "cpu" or runtime.provider == "tensorrt":
        raise BundleError(
            f"{runtime.provider} keeps state on its device, and a pool is in the host's memory: open the bundle with "
            "CPUExecutionProvider or openvino, or use Session"
        )
