"""TensorRT's part, played on the host: engines that onnxruntime runs, with the interface and addresses of real ones.

What it can't show is that a GPU does the same.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import Manifest, VariantSpec
from moeca_compile.runtime.bundle.signature import signature_of
from moeca_compile.runtime.tensorrt.library import Library

VERSION = "11.4.0"


class HostDevice:
    """Device memory is the host's. Counts what is copied."""

    arch = "sm_90"
    stream = 0

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.uploads = self.downloads = 0

    def allocate(self, size: int) -> int:
        block = np.full(size, 0xAB, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def upload(self, address: int, array: Any) -> None:
        self.uploads += 1
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Any, address: int) -> None:
        self.downloads += 1
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        pass


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


DataType = Enum("DataType", "FLOAT HALF BF16 INT64 INT32 INT8 UINT8 BOOL")
NAMES = {"float32": "FLOAT", "int64": "INT64", "float16": "HALF"}


class ILogger:
    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class Engine:
    """A variant's ONNX file, run by onnxruntime."""

    def __init__(self, bundle: Bundle, spec: VariantSpec) -> None:
        manifest = bundle.manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        graph = bundle.graphs[manifest.variants.index(spec)]
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = signature_of(spec, manifest)
        self.specs = self.inputs | self.outputs
        self.num_io_tensors = len(self.specs)
        self.contexts = True

    def get_tensor_name(self, i: int) -> str:
        return list(self.specs)[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[NAMES[self.specs[name].dtype]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(one if isinstance(one, int) else -1 for one in self.specs[name].shape)

    def create_execution_context(self) -> Any:
        return Context(self) if self.contexts else None


class Context:
    """Remembers shapes and addresses, as TensorRT's does."""

    largest = 8

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        batch = self.engine.inputs[name].batch_of(shape)
        self.shapes[name] = shape
        return batch is not None and batch <= self.largest

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 16 == 0 and address > 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batches = {spec.batch_of(self.shapes[key]) for key, spec in self.engine.inputs.items()} - {-1}
        assert len(batches) == 1
        return self.engine.outputs[name].sizes(batches.pop() or 0)

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        inputs = {name: self._view(name, self.shapes[name]) for name in self.engine.inputs}
        for name in self.engine.outputs:  # nobody promises that outputs are written last
            self._view(name, self.get_tensor_shape(name))[...] = 77
        found = self.engine.session.run(list(self.engine.outputs), inputs)
        for name, array in zip(self.engine.outputs, found, strict=True):
            self._view(name, array.shape)[...] = array
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(self.engine.specs[name].dtype)
        size = int(np.prod(shape)) * kind.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(shape)


def library_for(bundle: Bundle, name: str = "tensorrt", version: str = VERSION) -> Library:
    """A library whose runtime knows this bundle's engines: a plan is a variant's name."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            for spec in bundle.manifest.variants:
                if plan == spec.name.encode():
                    return Engine(bundle, spec)
            self.log.log(ILogger.Severity.ERROR, "the plan's header is wrong")
            return None

    api = SimpleNamespace(
        Runtime=Runtime, ILogger=ILogger, TensorIOMode=TensorIOMode, DataType=DataType, __version__=version
    )
    return Library(name, version, api)


def entries(manifest: Manifest, arch: str = HostDevice.arch, version: str = VERSION) -> list[dict[str, Any]]:
    """What a manifest says of such engines."""
    return [
        {
            "variant": one.name, "file": f"engines/{arch}-trt{version}/{one.name}.plan", "library": "tensorrt",
            "version": version, "arch": [arch], "batch": [1, 2, 8],
        }
        for one in manifest.variants
    ]  # fmt: skip
