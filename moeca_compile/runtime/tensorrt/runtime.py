"""The engines of a bundle that fit this machine, its GPU and its TensorRT, as a session's runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bundle import engine_file
from moeca_compile.runtime.bundle.manifest import EngineSpec, GraphSpec, Manifest
from moeca_compile.runtime.tensorrt.engine import EngineVariant
from moeca_compile.runtime.tensorrt.library import MODULES, Library, find, logger
from moeca_compile.runtime.tensorrt.memory import Device, DeviceTensor, Pool

NAME = "tensorrt"


class TensorrtRuntime:
    """Classic TensorRT or TensorRT-RTX on the first GPU, with engines that were built before.

    Args:
        memory: "speed"; each engine has its own copy of the weights.
        options: {"library": "tensorrt-rtx"} where both are installed and the bundle has engines for both.

    Raises:
        OptionError: another memory mode, or an unknown option.
    """

    provider = NAME

    def __init__(self, memory: str = "speed", options: Mapping[str, Any] | None = None) -> None:
        if memory != "speed":
            raise OptionError(f"memory={memory!r}: each engine of TensorRT has its own copy of the weights")
        rest = dict(options or {})
        self._wanted = rest.pop("library", "")
        if rest or self._wanted not in ("", *MODULES):
            raise OptionError(f"provider_options={options}: expected {{'library': one of {tuple(MODULES)}}}")
        self._ready: tuple[Library, Any, Pool, Any, list[str]] | None = None

    def load(self, graph: bytes, spec: GraphSpec, manifest: Manifest, folder: Path) -> EngineVariant:
        """The variant's engine; its checksum is verified first. `graph` isn't used.

        Raises:
            BundleError: no TensorRT, no GPU, no engine for both, or a damaged one.
        """
        if not manifest.engines:
            raise BundleError(f"the bundle has no engines: build them with `moeca engines {folder}`")
        if self._ready is None:
            self._ready = self._start(manifest)
        library, device, pool, runtime, errors = self._ready
        engine = fitting(spec, manifest, library, device.arch, folder)
        loaded = runtime.deserialize_cuda_engine(engine_file(folder, engine, manifest))
        if loaded is None:
            raise BundleError(f"{library} refuses {engine.file}: {' '.join(errors[-2:])[:600]}. Build it again here")
        return EngineVariant(loaded, engine, spec, manifest, library.api, pool)

    def zeros(self, sizes: tuple[int, ...], dtype: str) -> DeviceTensor:
        """A state that was never written."""
        assert self._ready is not None  # there is a variant that wants it
        return self._ready[2].zeros(sizes, dtype)

    def numpy(self, value: DeviceTensor) -> Any:
        return value.numpy()

    def version(self) -> str:
        return str(self._ready[0]) if self._ready else NAME

    def _start(self, manifest: Manifest) -> tuple[Library, Any, Pool, Any, list[str]]:
        names = {engine.library for engine in manifest.engines}
        # classic TensorRT first; a library without engines here comes last, to say for which there are some
        order = sorted(MODULES, key=lambda name: (name not in names, list(MODULES).index(name)))
        library = find(self._wanted) if self._wanted else find(*order)
        device, errors = Device(), list[str]()
        return library, device, Pool(device), library.api.Runtime(logger(library.api, errors)), errors


def fitting(spec: GraphSpec, manifest: Manifest, library: Library, arch: str, folder: Path) -> EngineSpec:
    """The variant's engine of this library's very version for this architecture.

    Raises:
        BundleError: there is none.
    """
    for engine in manifest.engines:
        made_with = (engine.library, engine.version) == (library.name, library.version)
        if engine.variant == spec.name and made_with and arch in engine.arch:
            return engine
    there = sorted({f"{', '.join(engine.arch)} with {engine.library} {engine.version}" for engine in manifest.engines})
    raise BundleError(
        f"no engines for {arch} with {library.name} {library.version}; the bundle has them for {'; '.join(there)}. "
        f"An engine runs on what it was built for only: build here with `moeca engines {folder}`"
    )
