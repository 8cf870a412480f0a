"""A model repository: a directory that `tritonserver --model-repository` takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.batched.budget import lanes_in, needs_of
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.fused import fused_signature
from moeca_compile.runtime.bundle.manifest import MANIFEST, STEP, Manifest
from moeca_compile.runtime.tensorrt import runtime as trt
from moeca_compile.runtime.triton.config import BUNDLE, MODEL_FILE, python_config, state_config
from moeca_compile.runtime.triton.pbtxt import dumps
from moeca_compile.runtime.writing import building

CONFIG = "config.pbtxt"
_MODEL = """\
from moeca_compile.runtime.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


def write_repository(
    bundle: Bundle, directory: str | Path, name: str = "", *, batch: int = 1, sequences: int = 64,
    idle_seconds: int = 60, provider: str = "CPUExecutionProvider", threads: int = 0, max_batch: int = 0,
    budget: int = 0,
) -> tuple[Path, ...]:  # fmt: skip
    """Write a bundle as models of a Triton server.

    `<name>`: the python backend over a copy of the bundle, each sequence a trajectory, any batch. If the bundle has a
    fused graph, `<name>_fused` too: onnxruntime's backend, where Triton keeps the state. The copy of
    the bundle is verified before this returns.

    Args:
        bundle: what to serve, opened.
        directory: the repository; made if it isn't there. It may hold other models.
        name: of the model; the bundle's without its ending by default.
        batch: of a request to `<name>_fused`, whose state has fixed sizes.
        sequences: trajectories at a time, at most.
        idle_seconds: after which a sequence without requests is dropped.
        provider: as for `Session.open`.
        threads: of one operator; 0: the runtime's choice.
        max_batch: sequences share calls of up to so many samples, as in a `BatchedSession`. Tensors of requests and
            responses then have an axis of size 1 in front. 0: each request is a call of its own.
        budget: with `max_batch`, bytes for the state of all sequences and for the copies that a call makes of it.

    Returns:
        The models' directories.

    Raises:
        BundleError: one of them exists, `directory` is in the bundle, or Triton can't serve the bundle.
        OptionError: a name or number that can't be.
        StateError: the budget has no room for a single sample.
    """
    name = name or re.sub(r"[^A-Za-z0-9_-]", "_", bundle.path.resolve().stem)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise OptionError(f"name={name!r}: expected letters, digits, '_', '.' and '-'")
    numbers = {"batch": batch, "sequences": sequences, "idle_seconds": idle_seconds, "threads": threads + 1}
    if small := [key for key, value in numbers.items() if value < 1]:
        raise OptionError(f"{', '.join(small)}: too small")
    directory = Path(directory)
    if directory.resolve().is_relative_to(bundle.path.resolve()):
        raise BundleError(f"{str(directory)!r} is in the bundle, which holds its own files only: write it elsewhere")
    if bundle.sizes:
        raise BundleError("a Triton model has one size and this bundle several: export a bundle for each")
    manifest = bundle.manifest
    if max_batch or budget:
        lanes_in(budget, needs_of(manifest), max_batch)
    config = python_config(
        name, manifest.inputs, manifest.outputs, sequences=sequences, idle_seconds=idle_seconds, provider=provider,
        threads=threads, max_batch=max_batch, budget=budget,
    )  # fmt: skip
    models = [directory / name]
    with building(models[0]) as folder:
        _copy(bundle, folder / "1" / BUNDLE, engines=provider == trt.NAME)
        Bundle.open(folder / "1" / BUNDLE)  # verifies the copy
        (folder / "1" / "model.py").write_text(_MODEL)
        (folder / CONFIG).write_text(dumps(config))
        if bundle.fused is not None:
            models.append(directory / f"{name}_fused")
            write_fused(bundle.fused, folder / "1" / BUNDLE, manifest, models[-1], batch, sequences, idle_seconds)
    return tuple(models)


def _copy(bundle: Bundle, folder: Path, engines: bool) -> None:
    left_out = set() if engines else {engine.file for engine in bundle.manifest.engines}
    try:
        for file in {MANIFEST, *bundle.manifest.files} - left_out:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, folder / file)
    except OSError as error:
        raise BundleError(f"can't copy the bundle: {error}") from error


def write_fused(
    graph: bytes, weights_in: Path, manifest: Manifest, path: Path, batch: int, sequences: int, idle_seconds: int
) -> None:
    """A bundle's fused graph as a model of onnxruntime's backend."""
    inputs, outputs = fused_signature(manifest)
    names = [STEP, *(spec.name for spec in manifest.state)]
    state = {name: inputs.pop(f"{name}_in") for name in names}
    for name in names:
        del outputs[f"{name}_out"]
    config = state_config(
        path.name, list(inputs.values()), list(outputs.values()), state, batch, sequences=sequences,
        idle_seconds=idle_seconds,
    )  # fmt: skip
    with building(path) as folder:
        (folder / "1").mkdir()
        (folder / "1" / MODEL_FILE).write_bytes(graph)
        for name in manifest.weight_files:
            shutil.copyfile(weights_in / name, folder / "1" / name)
        (folder / CONFIG).write_text(dumps(config))
