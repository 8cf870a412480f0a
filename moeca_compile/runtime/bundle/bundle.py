"""A bundle on disk: opened only when every file in it is what the manifest says. No torch, no runtime."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError, ScheduleError
from moeca_compile.runtime.bundle.bfloat16 import from_stored
from moeca_compile.runtime.bundle.consistency import check_consistency
from moeca_compile.runtime.bundle.manifest import (  # fmt: skip
    FUSED,
    GOLDEN,
    MANIFEST,
    SCHEDULE,
    WEIGHTS,
    EngineSpec,
    Manifest,
    bundle_id,
    golden_file,
)
from moeca_compile.runtime.bundle.summary import summary
from moeca_compile.schedule import Schedule

_LARGEST_TEXT = 1 << 26  # a manifest or a schedule beyond this is no such thing


@dataclass(frozen=True, repr=False)
class Bundle:
    """An exported directory, verified.

    Attributes:
        path: the directory.
        manifest: what is in it.
        schedule: bound to the graph's regions.
        graphs: the variants' ONNX files in the manifest's order, as they were when their checksums were verified.
        fused: all variants in one ONNX file, if the bundle has it.
        sizes: the same bundle at its further sizes (resolutions), one each.
        golden_name: the file of the recorded steps.
    """

    path: Path
    manifest: Manifest
    schedule: Schedule
    graphs: tuple[bytes, ...]
    fused: bytes | None = None
    sizes: tuple[Bundle, ...] = ()
    golden_name: str = GOLDEN

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle. The checksum of every file is verified first.

        Args:
            path: the directory that `moeca_compile.export` made.

        Returns:
            The verified bundle; no runtime has loaded it yet.

        Raises:
            BundleError: a file is missing, changed, contradictory, newer, or outside the directory.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{str(path)!r} is no directory; a bundle is one, made by moeca_compile.export")
        manifest = Manifest.parse(_read(folder, MANIFEST, _LARGEST_TEXT))
        if SCHEDULE in manifest.files and manifest.files[SCHEDULE].bytes > _LARGEST_TEXT:
            raise BundleError(f"{SCHEDULE} is too large to be one")
        text = _verified(folder, SCHEDULE, manifest)
        try:
            schedule = Schedule.from_json(text.decode())
        except (ScheduleError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{SCHEDULE}: {error}") from error
        check_consistency(manifest, schedule)
        manifests = [manifest, *manifest.further_sizes()]
        graphs, *others = (
            tuple(_verified(folder, variant.file, manifest) for variant in size.variants) for size in manifests
        )
        fused = _verified(folder, FUSED, manifest) if manifest.fused is not None else None
        for name in (WEIGHTS, *map(golden_file, range(len(manifests)))):
            _verified(folder, name, manifest, keep=False)
        if bundle_id(manifest.files[SCHEDULE].sha256, manifest.files[WEIGHTS].sha256) != manifest.id:
            raise BundleError(f"{MANIFEST}: the id isn't that of this schedule and these weights. Export again")
        sizes = tuple(
            cls(folder, size, schedule, size_graphs, golden_name=golden_file(i))
            for i, (size, size_graphs) in enumerate(zip(manifests[1:], others, strict=True), 1)
        )
        return cls(folder, manifest, schedule, graphs, fused, sizes)

    def golden(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Read the recorded steps of one trajectory, whose outputs torch made.

        Returns:
            Two lists with one dict a step: inputs by name, and outputs by name. bfloat16 comes as float32.

        Raises:
            BundleError: the file doesn't hold what the manifest says.
        """
        manifest = self.manifest
        try:
            with np.load(self.path / self.golden_name, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
        except Exception as error:  # whatever numpy and zipfile make of a broken file
            raise BundleError(f"{self.golden_name} can't be read: {error}") from error
        steps = manifest.golden.steps
        sides = []
        for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
            recorded = [arrays.get(f"{side}_{i:03d}") for i in range(len(specs))]
            if any(array is None or array.ndim < 1 or len(array) != steps for array in recorded):
                raise BundleError(f"{self.golden_name} doesn't hold {steps} steps of every {side}")
            pairs = [(spec, array) for spec, array in zip(specs, recorded, strict=True) if array is not None]
            sides.append(
                [{spec.name: from_stored(array[step], spec.dtype) for spec, array in pairs} for step in range(steps)]
            )
        return sides[0], sides[1]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {len(self.graphs)} variants)"

    def __str__(self) -> str:
        return summary(self)

    @property
    def bytes(self) -> int:
        """Of all files in the directory that the manifest knows, itself among them."""
        return sum(file.bytes for file in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size


def engine_file(folder: Path, engine: EngineSpec, manifest: Manifest) -> bytes:
    """An engine's bytes. Engines are verified here, when one is used: those of other machines needn't be there.

    Raises:
        BundleError: it is missing or damaged.
    """
    return _verified(folder, engine.file, manifest)


def _verified(folder: Path, name: str, manifest: Manifest, keep: bool = True) -> bytes:
    if name not in manifest.files:
        raise BundleError(f"{MANIFEST} doesn't list {name}. Export again")
    listed = manifest.files[name]
    file = _inside(folder, name)
    size = file.stat().st_size
    if size != listed.bytes:
        raise BundleError(
            f"{name} has {size} bytes, the manifest says {listed.bytes}: the bundle is damaged. Copy it again"
        )
    if keep:
        raw = _read(folder, name, size)
        digest = hashlib.sha256(raw).hexdigest()
    else:
        raw = b""
        with _reading(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != listed.sha256:
        raise BundleError(f"{name} isn't what was exported: its checksum differs. Copy the bundle again")
    return raw


def _read(folder: Path, name: str, most: int) -> bytes:
    with _reading(_inside(folder, name)) as stream:
        raw: bytes = stream.read(most + 1)
    if len(raw) > most:
        raise BundleError(f"{name} is larger than {most} bytes")
    return raw


def _inside(folder: Path, name: str) -> Path:
    """The file, if it is a plain one of the directory: no link leads out, no pipe blocks."""
    file = folder / name
    for parent in reversed(Path(name).parents[:-1]):
        if (folder / parent).is_symlink():
            raise BundleError(f"{parent} is a link; a bundle holds its own files")
    try:
        kind = os.lstat(file).st_mode
    except (OSError, ValueError):
        raise BundleError(f"{name} is missing from the bundle {str(folder)!r}") from None
    if not stat.S_ISREG(kind):
        raise BundleError(f"{name} is a link or no plain file; a bundle holds its own files")
    return file


def _reading(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise BundleError(f"{file.name} can't be read: {error.strerror}") from None
