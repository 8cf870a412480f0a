"""One engine, ready to run: state goes in and comes out at addresses of the device, and is never copied."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from moeca_compile.dtypes import OF_TENSORRT
from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.manifest import EngineSpec, GraphSpec, Manifest
from moeca_compile.runtime.bundle.signature import batch_of, check_shape, check_side, signature_of
from moeca_compile.runtime.tensorrt.memory import DeviceTensor, Pool


class EngineVariant:
    """One variant's engine. Several threads may run it; they take turns.

    Args:
        loaded: the engine, TensorRT's object.
        api: TensorRT's module.

    Raises:
        BundleError: its inputs and outputs aren't the manifest's.
    """

    def __init__(
        self, loaded: Any, engine: EngineSpec, spec: GraphSpec, manifest: Manifest, api: Any, pool: Pool
    ) -> None:
        self.spec, self.engine, self.pool = spec, engine, pool
        self._inputs, self._outputs = signature_of(spec, manifest)
        self._engine, self._lock = loaded, threading.Lock()
        self._check(api)
        self._context: Any = loaded.create_execution_context()
        if self._context is None:
            raise BundleError(f"TensorRT makes no context for {engine.file}: too little memory on the GPU?")

    def run(self, feeds: Mapping[str, Any]) -> list[DeviceTensor]:
        """One run. `feeds`: host arrays or tensors of the device by name, at least those that it takes.

        Returns:
            The model's outputs, then what the variant writes, each at an address that no living tensor has.

        Raises:
            BundleError: a batch that the engine wasn't built for, or a failure of TensorRT.
        """
        with self._lock:
            # held until the end: memory that is given back too soon would be taken for an output
            tensors = {name: self._on_device(feeds[name], spec.dtype) for name, spec in self._inputs.items()}
            for name, tensor in tensors.items():
                if not self._context.set_input_shape(name, tensor.shape):
                    raise BundleError(
                        f"{self.engine.file} doesn't take {name} of shape {list(tensor.shape)}: it was built for "
                        f"{self.engine.range}"
                    )
                self._bind(name, tensor)
            results = []
            batch = batch_of(self._inputs, feeds)
            for name, spec in self._outputs.items():
                sizes = tuple(self._context.get_tensor_shape(name))
                check_shape(self.engine.file, name, sizes, spec.sizes(batch))
                results.append(self.pool.take(sizes, spec.dtype))
                self._bind(name, results[-1])
            if not self._context.execute_async_v3(int(self.pool.device.stream)):
                raise BundleError(f"TensorRT failed in {self.engine.file}")
            self.pool.device.wait()
            return results

    def _on_device(self, value: Any, dtype: str) -> DeviceTensor:
        return value if isinstance(value, DeviceTensor) else self.pool.put(value, dtype)

    def _bind(self, name: str, tensor: DeviceTensor) -> None:
        if not self._context.set_tensor_address(name, tensor.address):
            raise BundleError(f"{self.engine.file} doesn't take an address for {name}")

    def _check(self, api: Any) -> None:
        engine = self._engine
        dtypes = {getattr(api.DataType, theirs): ours for theirs, ours in OF_TENSORRT.items()}
        reported: dict[bool, dict[str, tuple[str, list[int | None]]]] = {True: {}, False: {}}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            kind, sizes = engine.get_tensor_dtype(name), engine.get_tensor_shape(name)
            is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
            reported[is_input][name] = dtypes.get(kind, str(kind)), [None if size == -1 else size for size in sizes]
        check_side(self.engine.file, "inputs", self._inputs, reported[True])
        check_side(self.engine.file, "outputs", self._outputs, reported[False])
