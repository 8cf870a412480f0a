"""A bundle's files. The manifest comes last, and the directory gets its name when all is there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeca_compile.errors import BundleError
from moeca_compile.exporting.golden import Step
from moeca_compile.lower.onnx_weights import externalise
from moeca_compile.runtime.bfloat16 import to_stored
from moeca_compile.runtime.manifest import FUSED, GOLDEN, MANIFEST, SCHEDULE, WEIGHTS, bundle_id, digest_of
from moeca_compile.schedule import Schedule


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """A directory beside `path` to write into: it becomes `path` at the end, or it is gone.

    Raises:
        BundleError: `path` is taken, or the folder it is in can't be written.
    """
    if path.exists() or path.is_symlink():
        raise BundleError(f"{str(path)!r} exists already; remove it, or export to another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    except OSError as error:
        raise BundleError(f"can't write beside {str(path)!r}: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        os.rename(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_graphs(folder: Path, models: Mapping[str, tuple[str, Any]], schedule: Schedule) -> str:
    """Write weights, schedule and graphs; `models`: (row, onnx_ir.Model) by file name. Returns the bundle's id."""
    externalise([model for _, model in models.values()], folder)
    schedule.save(folder / SCHEDULE)
    identity = bundle_id(checksum(folder / SCHEDULE), checksum(folder / WEIGHTS))
    for name, (row, model) in models.items():
        model.metadata_props["moeca.row"] = row
        _write_graph(folder / name, model, identity)
    return identity


def write_fused(folder: Path, model: Any, identity: str) -> None:
    """Write the fused graph; its weights are in the weights file already."""
    _write_graph(folder / FUSED, model, identity)


def write_golden(folder: Path, steps: Sequence[Step]) -> None:
    arrays: dict[str, Any] = {}
    for side, name in enumerate(("input", "output")):
        for i in range(len(steps[0][side])):
            arrays[f"{name}_{i:03d}"] = np.stack([to_numpy(step[side][i]) for step in steps])
    with (folder / GOLDEN).open("wb") as file:
        np.savez(file, **arrays)


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """Add the checksums of all files in the folder, and the digest."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    data["files"] = {file.name: {"sha256": checksum(file), "bytes": file.stat().st_size} for file in files}
    data["digest"] = digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n")


def _write_graph(file: Path, model: Any, identity: str) -> None:
    import onnx_ir as ir

    model.producer_name = "moeca-compile"
    model.metadata_props["moeca.id"] = identity
    file.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_numpy(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # numpy has no such type: its bits
        return tensor.detach().contiguous().view(torch.uint16).numpy()
    return to_stored(tensor.detach().numpy())
