"""The golden steps of a bundle with other weights: the recorded inputs, and what a runtime of this machine makes of
them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.manifest import Manifest, golden_file
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.writing import entry_of, seal

if TYPE_CHECKING:
    from moeca_compile.runtime.bundle.bundle import Bundle


def record_golden(base: Bundle, folder: Path, data: dict[str, Any], provider: str) -> None:
    """Write the golden steps of each size, and what the manifest says of them.

    Args:
        base: the bundle whose inputs were recorded.
        folder: of the new bundle, which has everything else.
        data: its manifest; the golden steps' entries are set.
        provider: as for `Session.open`.

    Raises:
        BundleError: it can't run the bundle, or the steps give values that aren't finite.
    """
    names = [golden_file(size) for size in range(1 + len(base.sizes))]
    for name in names:
        shutil.copyfile(base.path / name, folder / name)
        data["files"][name] = entry_of(folder / name)
    seal(folder, data)
    session = Session.open(folder, provider)
    for name, at_size in zip(names, (session, *session.sizes), strict=True):
        with np.load(folder / name, allow_pickle=False) as recorded:
            arrays = {key: recorded[key] for key in recorded.files if key.startswith("input_")}
        arrays |= _outputs(at_size)
        with (folder / name).open("wb") as file:
            np.savez(file, **arrays)
        data["files"][name] = entry_of(folder / name)
    data["golden"] |= {"by": session.runtime.version(), "measured": []}


def _outputs(session: Session) -> dict[str, Any]:
    manifest: Manifest = session.manifest
    steps: list[list[Any]] = [[] for _ in manifest.outputs]
    with session.trajectory() as trajectory:
        for call in session.bundle.golden()[0]:
            results = trajectory.run(call)
            for place, spec in enumerate(manifest.outputs):
                array = results[spec.name]
                steps[place].append(bfloat16.rounded(array) if spec.dtype == bfloat16.NAME else array)
    return {f"output_{place:03d}": np.stack(arrays) for place, arrays in enumerate(steps)}
