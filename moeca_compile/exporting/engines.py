"""Engines of TensorRT for a bundle that was just written, where they can be built here."""

from __future__ import annotations

from pathlib import Path

from moeca_compile.errors import BundleError, warn
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.lowering.tensorrt import build as tensorrt
from moeca_compile.lowering.tensorrt.build import EngineRequest
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.tensorrt.library import find


def add_engines(folder: Path, path: Path, request: EngineRequest | None, tick: ProgressCallback) -> None:
    """Build an engine of each variant into the bundle in `folder`, which will be called `path`.

    Args:
        request: which to build; None: what can be built here, and where nothing can, a warning.

    Raises:
        BundleError: there is no TensorRT, or no GPU that it needs, for the engines of `request`.
        LoweringError: TensorRT refuses a graph.
    """
    if request is None:
        try:
            tensorrt.targets(find(), ())
        except BundleError as error:
            warn(f"no engines were built: {error}. On the machine that is to run them: moeca engines {path}")
            return
    tensorrt.build_engines(Bundle.open(folder), request, lambda text, done: tick(text, 0.9 + 0.1 * done))
