"""Memory of the GPU: when nobody holds a tensor any more, its place goes to the next one of its size."""

from __future__ import annotations

import importlib
import math
import threading
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype

_GRAIN = 256  # bytes; CUDA aligns to that anyway


class Device:
    """The first GPU, through CUDA's runtime: memory, copies and one stream, in order.

    Raises:
        BundleError: no GPU, or no `cuda-bindings`.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise BundleError(f"running an engine needs cuda-bindings: pip install cuda-bindings ({error})") from None
        kind = self._cuda.cudaDeviceAttr
        numbers = (kind.cudaDevAttrComputeCapabilityMajor, kind.cudaDevAttrComputeCapabilityMinor)
        self.arch = "sm_" + "".join(str(self._call("cudaDeviceGetAttribute", number, 0)) for number in numbers)
        self.stream: Any = self._call("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def upload(self, address: int, array: Any) -> None:
        """From the host; done when this returns, as far as the host's array goes."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        self.wait()

    def download(self, array: Any, address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
        self.wait()

    def wait(self) -> None:
        """Until everything on the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def _copy(self, to: int, source: int, size: int, way: str) -> None:
        self._call("cudaMemcpyAsync", to, source, size, getattr(self._cuda.cudaMemcpyKind, way), self.stream)

    def _call(self, name: str, *args: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*args)
        if error != self._cuda.cudaError_t.cudaSuccess:
            reason = self._cuda.cudaGetErrorString(error)[1]
            raise BundleError(f"CUDA: {name} failed: {reason.decode() if isinstance(reason, bytes) else reason}")
        return results[0] if results else None


class DeviceTensor:
    """A tensor on the device. When it is forgotten, its memory is the pool's again."""

    __slots__ = ("_pool", "_size", "address", "dtype", "shape")

    def __init__(self, pool: Pool, address: int, size: int, shape: tuple[int, ...], dtype: str) -> None:
        self._pool, self._size = pool, size
        self.address, self.shape, self.dtype = address, shape, dtype

    def numpy(self) -> Any:
        """A copy on the host; of bfloat16 its bits."""
        array = np.empty(self.shape, stored_dtype(self.dtype))
        self._pool.device.download(array, self.address)
        return array

    def __del__(self) -> None:
        self._pool.give_back(self.address, self._size)


class Pool:
    """Tensors of a device. Their number settles at what is alive at a time: states take turns at a few addresses, and
    nothing is copied from one to the next."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._free: dict[int, list[int]] = {}
        self._lock = threading.Lock()
        self.allocated = 0  # bytes

    def take(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """A tensor with anything in it."""
        count = math.prod(shape) * stored_dtype(dtype).itemsize
        size = max(-(-count // _GRAIN), 1) * _GRAIN
        with self._lock:
            free = self._free.setdefault(size, [])
            address = free.pop() if free else None
        if address is None:
            address = self.device.allocate(size)
            self.allocated += size
        return DeviceTensor(self, address, size, shape, dtype)

    def put(self, array: Any, dtype: str) -> DeviceTensor:
        """The host's array on the device."""
        tensor = self.take(array.shape, dtype)
        self.device.upload(tensor.address, array)
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        return self.put(np.zeros(shape, stored_dtype(dtype)), dtype)

    def give_back(self, address: int, size: int) -> None:
        with self._lock:
            self._free[size].append(address)
