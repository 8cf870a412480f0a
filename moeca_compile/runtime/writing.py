"""Writing directories that are whole or not there, and manifests that know every file. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import glob
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
from moeca_compile.runtime.bundle.manifest import MANIFEST, digest_of


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """A directory beside `path` to write into: it becomes `path` at the end, or it is gone.

    Raises:
        BundleError: `path` is taken, now or at the end, or the folder it is in can't be written.
    """
    if path.exists() or path.is_symlink():
        raise BundleError(f"{str(path)!r} exists already; remove it, or export to another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"can't write beside {str(path)!r}: {error.strerror}") from error
    with unfinished(path.parent, path.name) as folder:
        yield folder
        folder.chmod(0o755)
        try:
            os.rename(folder, path)
        except OSError as error:
            meanwhile = "; another process made it meanwhile" if path.exists() else ""
            raise BundleError(f"{str(path)!r} can't be made: {error.strerror}{meanwhile}") from error


@contextmanager
def unfinished(parent: Path, name: str) -> Iterator[Path]:
    """A new directory `.<name>.<random>.unfinished` in `parent`: whoever wants it moves it away, else it is removed.

    Its lock is held until then. A process that is killed leaves a directory without a holder, and the next one that
    writes under the same name removes it.

    Raises:
        BundleError: `parent` can't be written.
    """
    _sweep(parent, name)
    folder, lock = _locked(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".unfinished", dir=parent))
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            if not parent.is_dir():
                raise BundleError(f"can't write into {str(parent)!r}: it is no directory") from None
            continue  # swept before it was locked
        except OSError as error:
            raise BundleError(f"can't write into {str(parent)!r}: {error.strerror}") from error
        with contextlib.suppress(OSError):  # a file system without locks: nothing there is swept either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed processes left under this name."""
    for folder in parent.glob(f".{glob.escape(name)}.*.unfinished"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # somebody is writing it
            pass
        finally:
            os.close(lock)


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
