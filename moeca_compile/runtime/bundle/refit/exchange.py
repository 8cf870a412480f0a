"""A bundle with other weights: the graphs stay, and so does the file of the weights that don't change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from moeca_compile.errors import BundleError, warn
from moeca_compile.runtime.bundle.bfloat16 import stored_dtype
from moeca_compile.runtime.bundle.graphs import with_weights_at
from moeca_compile.runtime.bundle.manifest import CHANGED, PARAMETERS, SCHEDULE, VERSION, WEIGHTS, bundle_id
from moeca_compile.runtime.bundle.refit.given import GivenWeights
from moeca_compile.runtime.bundle.refit.golden import record_golden
from moeca_compile.runtime.bundle.refit.parameters import ParameterTable, StoredSpec, bytes_of
from moeca_compile.runtime.bundle.refit.places import append
from moeca_compile.runtime.bundle.refit.recipes import made_of, parameters_of
from moeca_compile.runtime.reading import verified
from moeca_compile.runtime.writing import building, entry_of, seal

if TYPE_CHECKING:
    from moeca_compile.runtime.bundle.bundle import Bundle

Place = tuple[str, int]  # a file of weights, and where a constant begins in it


def exchange(bundle: Bundle, weights: Mapping[str, Any] | str | Path, path: Path, provider: str) -> None:
    """Write to `path` what `Bundle.with_weights` says."""
    manifest = bundle.manifest
    table = ParameterTable.read(bundle.path, manifest.files)
    given = GivenWeights(weights, table)
    if manifest.engines:
        warn("the bundle's engines have its old weights in them and are left out: build engines of the new bundle")
    with building(path) as folder:
        _share(bundle.path / WEIGHTS, folder / WEIGHTS)
        shutil.copyfile(bundle.path / SCHEDULE, folder / SCHEDULE)
        places = _write_changed(bundle.path, table, given, folder)
        _moved(table, places).write(folder)
        data = msgspec.to_builtins(manifest)
        files = {name: data["files"][name] for name in (SCHEDULE, WEIGHTS)}
        files |= {name: entry_of(folder / name) for name in (CHANGED, PARAMETERS) if (folder / name).exists()}
        hashes = [files[name]["sha256"] for name in (SCHEDULE, WEIGHTS, CHANGED) if name in files]
        data |= {"version": VERSION, "base": manifest.id, "id": bundle_id(*hashes), "files": files}
        data.pop("engines", None)
        for name in [name for name in manifest.files if name.endswith(".onnx")]:
            raw = verified(bundle.path, name, manifest.files)
            (folder / name).write_bytes(with_weights_at(raw, places, data["id"]))
            files[name] = entry_of(folder / name)
        record_golden(bundle, folder, data, provider)
        seal(folder, data)


def _share(source: Path, target: Path) -> None:
    """One file under two names, so that its bytes are on the disk and in memory once."""
    try:
        os.link(source, target)
    except OSError as error:
        warn(f"{source.name} can't be shared with {str(source.parent)!r} and is copied: {error.strerror}")
        shutil.copyfile(source, target)


def _write_changed(source: Path, table: ParameterTable, given: GivenWeights, folder: Path) -> dict[Place, Place]:
    """Write the constants that aren't as they were exported.

    Returns:
        Where they lie now, by where they lay before.
    """
    places: dict[Place, Place] = {}
    with (folder / CHANGED).open("wb") as file:
        for stored in table.stored:
            is_given = any(name in given for name in parameters_of(stored.recipe))
            if stored.file == WEIGHTS and not is_given:
                continue
            before = _read(source, stored)
            after = _made(stored, table, given, before) if is_given else before
            if stored.file != WEIGHTS or after != before:
                places[stored.file, stored.offset] = CHANGED, append(file, after)
    if not places:
        (folder / CHANGED).unlink()
    return places


def _read(folder: Path, stored: StoredSpec) -> bytes:
    with (folder / stored.file).open("rb") as file:
        file.seek(stored.offset)
        raw = file.read(bytes_of(stored))
    if len(raw) != bytes_of(stored):
        raise BundleError(f"{stored.file} changed while the bundle was opened")
    return raw


def _made(stored: StoredSpec, table: ParameterTable, given: GivenWeights, before: bytes) -> bytes:
    """The constant, where parameters that aren't given have their values of before."""
    arrays: dict[str, Any] = {}
    is_new: dict[str, Any] = {}
    for name in parameters_of(stored.recipe):
        shape = table.parameters[name].shape
        missing = np.broadcast_to(np.zeros((), stored_dtype(stored.dtype)), shape)
        arrays[name] = given.array(name) if name in given else missing
        is_new[name] = np.broadcast_to(np.array(name in given), shape)
    try:
        after = made_of(stored.recipe, arrays)
        if not all(name in given for name in arrays):
            old = np.frombuffer(before, after.dtype).reshape(stored.shape)
            after = np.where(made_of(stored.recipe, is_new), after, old)
    except (ValueError, IndexError) as error:
        raise BundleError(f"{PARAMETERS}: a recipe doesn't fit its parameters: {error}. Export again") from None
    if after.shape != stored.shape or after.dtype != stored_dtype(stored.dtype):
        raise BundleError(
            f"{PARAMETERS}: a recipe doesn't fit its parameters: it gives {list(after.shape)}. Export again"
        )
    return bytes(after.tobytes())


def _moved(table: ParameterTable, places: Mapping[Place, Place]) -> ParameterTable:
    stored = list[StoredSpec]()
    for entry in table.stored:
        file, offset = places.get((entry.file, entry.offset), (entry.file, entry.offset))
        stored.append(msgspec.structs.replace(entry, file=file, offset=offset))
    return msgspec.structs.replace(table, stored=tuple(stored))
