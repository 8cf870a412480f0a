"""Variants on OpenVINO's CPU plugin. Values are numpy arrays: what a run gives is written straight into them."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.dtypes import OF_OPENVINO
from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bfloat16 import NAME as BFLOAT16
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.manifest import GraphSpec, Manifest
from moeca_compile.runtime.bundle.signature import (
    Specs,
    batch_of,
    check_identity,
    check_shape,
    check_side,
    signature_of,
)  # fmt: skip

NAME = "openvino"


class OpenvinoRuntime:
    """OpenVINO on the CPU, in the precision of the graph.

    Args:
        memory: "speed"; OpenVINO packs each variant's weights and can't be kept from it.
        threads: of one run; None: OpenVINO's choice.
        options: properties of the device, such as {"INFERENCE_PRECISION_HINT": "bf16"}.

    Raises:
        BundleError: OpenVINO isn't installed.
        OptionError: another memory mode.
    """

    provider = NAME

    def __init__(
        self, memory: str = "speed", threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        if memory != "speed":
            raise OptionError(f"memory={memory!r}: OpenVINO has its own copy of the weights for each variant")
        self.library = library()
        self.core = self.library.Core()
        self.core.set_property({"ENABLE_MMAP": False})  # a mapped file that shrinks kills the process
        # NOTE: left alone it computes float32 graphs in bfloat16 where the CPU can
        self.options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        self.options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        self.options |= dict(options or {})

    def load(self, graph: bytes, spec: GraphSpec, manifest: Manifest, folder: Path) -> OpenvinoVariant:
        """Raises:
        BundleError: OpenVINO refuses the graph, or its signature isn't the manifest's.
        """
        model = self.read(graph, spec.file, folder)
        check_identity(spec, manifest, metadata(model))
        return OpenvinoVariant(self, model, spec, manifest)

    def read(self, graph: bytes, file: str, folder: Path) -> Any:
        """The model of an ONNX file, whose weights lie in `folder`."""
        if (folder / file).read_bytes() != graph:  # OpenVINO finds weights beside a file only
            raise BundleError(f"{file} changed while the bundle was opened")
        try:
            return self.core.read_model(folder / file)
        except Exception as error:
            raise BundleError(f"{version()} refuses {file}: {last_lines(error)}") from error

    def compile(self, model: Any, file: str) -> Any:
        try:
            return self.core.compile_model(model, "CPU", self.options)
        except Exception as error:
            raise BundleError(f"{version()} refuses {file}: {last_lines(error)}") from error

    def zeros(self, sizes: tuple[int, ...], dtype: str) -> Any:
        """A state that was never written."""
        return np.zeros(sizes, stored_dtype(dtype))

    def numpy(self, value: Any) -> Any:
        return value

    def version(self) -> str:
        return version()


class OpenvinoVariant:
    """One variant, ready to run. Several threads may run it at once: each has an inference request of its own."""

    def __init__(self, runtime: OpenvinoRuntime, model: Any, spec: GraphSpec, manifest: Manifest) -> None:
        self.spec = spec
        self._takes, self._gives = signature_of(spec, manifest)
        check_side(spec.file, "inputs", self._takes, signature_reported(model.inputs))
        check_side(spec.file, "outputs", self._gives, signature_reported(model.outputs))
        self._library, self._compiled = runtime.library, runtime.compile(model, spec.file)
        self._requests = threading.local()
        self._proven: set[int] = set()  # batches at which the results have the manifest's sizes

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """One run. `feeds`: contiguous arrays by the graph's input names, at least those that it takes.

        Returns:
            Arrays: the model's outputs, then what the variant writes, then how many branches were dropped, where it
            counts them. States go in and come out without a copy.
        """
        batch = batch_of(self._takes, feeds)
        sizes = {name: spec.sizes(batch) for name, spec in self._gives.items()}
        try:
            if batch not in self._proven:
                return self._first(feeds, batch, sizes)
            request = getattr(self._requests, "mine", None)
            if request is None:
                request = self._requests.mine = self._compiled.create_infer_request()
            results = {name: np.empty(sizes[name], stored_dtype(spec.dtype)) for name, spec in self._gives.items()}
            self._set(request, self._takes, feeds)
            self._set(request, self._gives, results)
            request.infer()
        except BundleError:
            raise
        except Exception as error:
            raise BundleError(f"OpenVINO failed in {self.spec.file}: {last_lines(error)}") from error
        return list(results.values())

    def _first(self, feeds: Mapping[str, Any], batch: int, sizes: Mapping[str, tuple[int, ...]]) -> list[Any]:
        """A run into OpenVINO's own memory. It takes arrays that are given for results at their word, and writes past
        the end of those that are too small."""
        request = self._compiled.create_infer_request()
        self._set(request, self._takes, feeds)
        request.infer()
        tensors = {name: request.get_tensor(name) for name in self._gives}
        for name, tensor in tensors.items():
            check_shape(self.spec.file, name, tensor.shape, sizes[name])
        self._proven.add(batch)
        return [tensors[name].data.copy().view(stored_dtype(spec.dtype)) for name, spec in self._gives.items()]

    def _set(self, request: Any, specs: Specs, arrays: Mapping[str, Any]) -> None:
        for name, spec in specs.items():
            request.set_tensor(name, tensor_of(self._library, arrays[name], spec.dtype))


def metadata(model: Any) -> dict[str, str]:
    """What the ONNX file carries."""
    carried = dict(model.get_rt_info()).get("framework", {})
    return {name: str(value.astype(str)) for name, value in carried.items()}


def make_stateful(model: Any, pairs: Mapping[str, str]) -> None:
    """Turn inputs and the outputs that feed them next time into variables of the model, in place."""
    importlib.import_module("openvino._offline_transformations").apply_make_stateful_transformation(model, dict(pairs))


def tensor_of(library: Any, array: Any, dtype: str) -> Any:
    """An OpenVINO tensor over the array's memory."""
    if dtype == BFLOAT16:
        return library.Tensor(array, library.Shape(array.shape), library.Type.bf16)
    return library.Tensor(array, shared_memory=True)


def signature_reported(ports: Sequence[Any]) -> dict[str, tuple[str, list[Any]]]:
    """What OpenVINO says of inputs or outputs; a size that depends on the batch is None."""
    reported = {}
    for port in ports:
        kind = port.get_element_type().get_type_name()
        sizes = [None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
        reported[port.get_any_name()] = OF_OPENVINO.get(kind, kind), sizes
    return reported


def version() -> str:
    return f"openvino {library().__version__.split('-')[0]}"


def library() -> Any:
    """The openvino package.

    Raises:
        BundleError: it isn't installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BundleError(f"this needs OpenVINO: pip install 'moeca-compile[openvino]' ({error})") from None


def last_lines(error: Exception) -> str:
    """OpenVINO begins with the places in its own source."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return " ".join(lines[-3:])[:500]
