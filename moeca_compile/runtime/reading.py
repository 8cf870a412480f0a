"""Reading the files of an exported directory: each is checked against the manifest's list first. No torch."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.manifest import MANIFEST, FileSpec

LARGEST_TEXT = 1 << 26  # bytes; a manifest or a schedule beyond this is no such thing


def verified(folder: Path, name: str, files: Mapping[str, FileSpec], keep: bool = True) -> bytes:
    """The bytes of a file, if they are what the manifest says.

    Args:
        folder: the directory.
        name: of the file in it.
        files: what the manifest lists.
        keep: False: give nothing, for a file that is only checked.

    Raises:
        BundleError: it isn't listed, is missing or changed, or is outside the directory.
    """
    if name not in files:
        raise BundleError(f"{MANIFEST} doesn't list {name}. Export again")
    listed = files[name]
    file = _inside(folder, name)
    size = file.stat().st_size
    if size != listed.bytes:
        raise BundleError(
            f"{name} has {size} bytes, the manifest says {listed.bytes}: the directory is damaged. Copy it again"
        )
    if keep:
        raw = read(folder, name, size)
        digest = hashlib.sha256(raw).hexdigest()
    else:
        raw = b""
        with _reading(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != listed.sha256:
        raise BundleError(f"{name} isn't what was exported: its checksum differs. Copy the directory again")
    return raw


def read(folder: Path, name: str, most: int) -> bytes:
    """The bytes of a file of the directory, at most `most`.

    Raises:
        BundleError: it is larger, missing, or outside the directory.
    """
    with _reading(_inside(folder, name)) as stream:
        raw: bytes = stream.read(most + 1)
    if len(raw) > most:
        raise BundleError(f"{name} is larger than {most} bytes")
    return raw


def _inside(folder: Path, name: str) -> Path:
    """The file, if it is a plain one of the directory: no link leads out, no pipe blocks.

    Raises:
        BundleError: it isn't, or is missing.
    """
    file = folder / name
    for parent in reversed(Path(name).parents[:-1]):
        if (folder / parent).is_symlink():
            raise BundleError(f"{parent} is a link; a bundle or package holds its own files")
    try:
        kind = os.lstat(file).st_mode
    except (OSError, ValueError):
        raise BundleError(f"{name} is missing from {str(folder)!r}") from None
    if not stat.S_ISREG(kind):
        raise BundleError(f"{name} is a link or no plain file; a bundle or package holds its own files")
    return file


def _reading(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise BundleError(f"{file.name} can't be read: {error.strerror}") from None
