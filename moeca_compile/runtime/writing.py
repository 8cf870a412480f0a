"""Writing directories that are whole or not there, and manifests that know every file. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeca_compile.errors import BundleError
from moeca_compile.runtime.manifest import MANIFEST, digest_of


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


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """With the checksums of all files in the folder."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    data["files"] = {file.name: entry_of(file) for file in files}
    seal(folder, data)


def entry_of(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": checksum(file), "bytes": file.stat().st_size}


def seal(folder: Path, data: dict[str, Any]) -> None:
    """Write the manifest with its digest, in one go."""
    data["digest"] = digest_of(data)
    fresh = folder / f".{MANIFEST}.unfinished"
    fresh.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(fresh, folder / MANIFEST)


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
