"""What a session needs of a runtime, and which one a provider's name means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moeca_compile.runtime.bundle.manifest import GraphSpec, Manifest
from moeca_compile.runtime.providers import onnxruntime as ort
from moeca_compile.runtime.providers import openvino
from moeca_compile.runtime.tensorrt import runtime as trt


class Loaded(Protocol):
    """One graph, ready to run in any thread."""

    spec: Any  # the VariantSpec of a variant

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Values of the runtime's own: the model's outputs, what is written, and what is counted, in this order; of a
        prologue what it gives."""


class Runtime(Protocol):
    """One runtime on one device. Its values are opaque: what a variant gave goes into the next as it is."""

    provider: str

    def load(self, graph: bytes, spec: GraphSpec, manifest: Manifest, folder: Path) -> Loaded: ...

    def zeros(self, sizes: tuple[int, ...], dtype: str) -> Any: ...

    def numpy(self, value: Any) -> Any: ...

    def version(self) -> str: ...


def runtime_of(
    provider: str, memory: str = "speed", threads: int | None = None, options: Mapping[str, Any] | None = None
) -> Runtime:
    """OpenVINO for "openvino", a bundle's engines for "tensorrt", else an execution provider of onnxruntime.

    Raises:
        BundleError: it isn't installed, or has no such provider.
        OptionError: no such memory mode.
    """
    if provider == openvino.NAME:
        return openvino.OpenvinoRuntime(memory, threads, options)
    if provider == trt.NAME:
        return trt.TensorrtRuntime(memory, options)
    return ort.OrtRuntime(provider, memory, threads, options)
