"""A bundle on disk: opened only when every file in it is what the manifest says. No torch, no runtime."""

from __future__ import annotations

from collections.abc import Mapping
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
    PARAMETERS,
    SCHEDULE,
    EngineSpec,
    Manifest,
    bundle_id,
    golden_file,
)
from moeca_compile.runtime.bundle.summary import summary
from moeca_compile.runtime.reading import LARGEST_TEXT, read, verified
from moeca_compile.schedule import Schedule


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
        prologues: the ONNX files of the prologues.
    """

    path: Path
    manifest: Manifest
    schedule: Schedule
    graphs: tuple[bytes, ...]
    fused: bytes | None = None
    sizes: tuple[Bundle, ...] = ()
    golden_name: str = GOLDEN
    prologues: tuple[bytes, ...] = ()

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
        manifest = Manifest.parse(read(folder, MANIFEST, LARGEST_TEXT))
        if SCHEDULE in manifest.files and manifest.files[SCHEDULE].bytes > LARGEST_TEXT:
            raise BundleError(f"{SCHEDULE} is too large to be one")
        text = verified(folder, SCHEDULE, manifest.files)
        try:
            schedule = Schedule.from_json(text.decode())
        except (ScheduleError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{SCHEDULE}: {error}") from error
        check_consistency(manifest, schedule)
        manifests = [manifest, *manifest.further_sizes()]
        graphs, *others = (
            tuple(verified(folder, variant.file, manifest.files) for variant in size.variants) for size in manifests
        )
        prologues, *other_prologues = (
            tuple(verified(folder, prologue.file, manifest.files) for prologue in size.prologues) for size in manifests
        )
        fused = verified(folder, FUSED, manifest.files) if manifest.fused is not None else None
        unread = [*manifest.weight_files, *map(golden_file, range(len(manifests)))]
        for name in unread + [PARAMETERS] * (PARAMETERS in manifest.files):
            verified(folder, name, manifest.files, keep=False)
        weights = [manifest.files[name].sha256 for name in manifest.weight_files]
        if bundle_id(manifest.files[SCHEDULE].sha256, *weights) != manifest.id:
            raise BundleError(f"{MANIFEST}: the id isn't that of this schedule and these weights. Export again")
        sizes = tuple(
            cls(folder, size, schedule, size_graphs, golden_name=golden_file(i), prologues=size_prologues)
            for i, (size, size_graphs, size_prologues) in enumerate(
                zip(manifests[1:], others, other_prologues, strict=True), 1
            )
        )
        return cls(folder, manifest, schedule, graphs, fused, sizes, prologues=prologues)

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

    def with_weights(
        self, weights: Mapping[str, Any] | str | Path, path: str | Path, *, provider: str = "CPUExecutionProvider"
    ) -> Bundle:
        """Write a bundle with the same graphs and schedule, and other weights: of an adapter that was merged into the
        model, or of a fine-tuned model.

        It gives bit for bit what an export of the changed model gives. Constants that don't change stay in the
        `weights.bin` of this bundle, which the new bundle shares as a hard link; the others are in its `changed.bin`.
        The golden steps are run anew, by the runtime, without torch. Engines aren't taken over.

        Args:
            weights: arrays or torch tensors by the names of the model's state dict, such as `model.state_dict()`, or a
                file in the safetensors format. In the bundle's shapes and dtypes; those left out stay as they are.
            path: the directory to make; it must not exist.
            provider: runs the golden steps, as for `Session.open`.

        Returns:
            The new bundle, opened.

        Raises:
            BundleError: an unknown name, another shape or dtype, a parameter that the graphs' constants were computed
                with, an unreadable file, a path that is taken, a bundle that is older or can't be run here.
        """
        from moeca_compile.runtime.bundle.refit.exchange import exchange

        exchange(self, weights, Path(path), provider)
        return Bundle.open(path)

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
    return verified(folder, engine.file, manifest.files)
