"""Get the typefaces: one package of Debian, checked against the manifest, and the faces in it that `faces.csv` lists.

    python -m examples.glyphs.fonts              # download (509 MB), check, unpack, render -> build/glyphs/glyphs.npz
    python -m examples.glyphs.fonts --select     # and choose the faces anew: writes faces.csv

The fonts are not part of this repository. `apt-get download` and `dpkg-deb` do the work, so this runs on Debian and its
derivatives; elsewhere put the .deb that the manifest names into the folder first (`dpkg-deb` is still needed).
"""

from __future__ import annotations

import csv
import getopt
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fontTools.ttLib import TTFont

from examples.glyphs.render import CHARACTERS, fault

HERE = Path(__file__).parent
FACES_FILE = HERE / "faces.csv"
FOLDER = Path("build/glyphs")  # ignored by git
LICENSES = ("open font license", "open font licence", "scripts.sil.org/ofl", "openfontlicense.org")
FACES_OF_A_FAMILY = 16  # at most; otherwise a few families with dozens of weights would be half of the data
TEST_SHARE = 6  # one family in six is held out


class Face(NamedTuple):
    """A font file below the manifest's folder, its family (what the split is by), and "train" or "test"."""

    path: str
    family: str
    split: str


def manifest() -> dict[str, str]:
    """The package: its name, version, file, sha256, folder and license."""
    return json.loads((HERE / "manifest.json").read_text())


def faces() -> list[Face]:
    """The faces that are used, in the order of the data."""
    with FACES_FILE.open(newline="") as lines:
        return [Face(*row) for row in csv.reader(lines)]


def fetch(folder: Path = FOLDER) -> Path:
    """Download the package unless it is there, check its sha256, unpack its fonts.

    Returns:
        The folder that the paths in `faces.csv` start from.

    Raises:
        SystemExit: the file isn't the one of the manifest.
    """
    package = manifest()
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package["file"]
    if not archive.exists():
        subprocess.run(["apt-get", "download", f"{package['package']}={package['version']}"], cwd=folder, check=True)
    verify(archive, package["sha256"])
    root = folder / package["folder"]
    if not root.exists():
        unpack(archive, folder)
    return root


def unpack(archive: Path, folder: Path) -> None:
    """Put the package's fonts into a folder, all or none.

    Raises:
        SystemExit: the package can't be read.
    """
    partial = folder / "unpacked.part"
    partial.mkdir(exist_ok=True)
    wildcards = ["--wildcards", "*.otf", "*.ttf"]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as reader:
        failed = subprocess.run(["tar", "-x", "-C", partial, *wildcards], stdin=reader.stdout).returncode
    if reader.returncode or failed:
        raise SystemExit(f"dpkg-deb and tar could not unpack {archive}")
    (partial / "usr").rename(folder / "usr")
    partial.rmdir()


def verify(archive: Path, sha256: str) -> None:
    """Compare a file with its sha256.

    Raises:
        SystemExit: they differ.
    """
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise SystemExit(f"{archive} has sha256 {digest}, not {sha256}: delete it and run this again")


def select(root: Path) -> list[Face]:
    """All faces under a folder that are free (OFL), fit to learn from and not too many of one family."""
    families: dict[str, list[str]] = {}
    for path in sorted([*root.rglob("*.otf"), *root.rglob("*.ttf")]):
        family = free_family(path)
        if family and not fault(path):
            families.setdefault(family, []).append(str(path.relative_to(root)))
    chosen = []
    for family, paths in sorted(families.items()):
        count = min(len(paths), FACES_OF_A_FAMILY)
        chosen += [Face(paths[i * len(paths) // count], family, split_of(family)) for i in range(count)]
    return chosen


def free_family(path: Path) -> str:
    """The first word of the family's name, in lower case; "" where the face isn't OFL or lacks a character.

    One word, so that Alegreya and Alegreya Sans, or all of Noto, are never on both sides of the split.
    """
    with TTFont(path, lazy=True) as font:
        names = font["name"]
        license_text = " ".join(str(record) for record in names.names if record.nameID in (0, 13, 14)).lower()
        characters = font.getBestCmap() or {}
        if not any(name in license_text for name in LICENSES) or any(ord(c) not in characters for c in CHARACTERS):
            return ""
        return (names.getDebugName(16) or names.getDebugName(1) or "").lower().split()[0]


def split_of(family: str) -> str:
    """ "test" for about one family in six, by a hash of its name, else "train"."""
    digest = hashlib.sha256(family.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def main(argv: Sequence[str] | None = None) -> None:
    """Options: --folder DIR (default build/glyphs); --select, choose the faces anew and write faces.csv."""
    from examples.glyphs import data

    try:
        pairs, rest = getopt.getopt(list(sys.argv[1:] if argv is None else argv), "", ["folder=", "select"])
    except getopt.GetoptError as error:
        raise SystemExit(f"{error}\n{main.__doc__}") from None
    if rest:
        raise SystemExit(f"no positional arguments\n{main.__doc__}")
    options = dict(pairs)
    folder = Path(options.get("--folder", FOLDER))
    root = fetch(folder)
    if "--select" in options:
        chosen = data.without_twins(root, select(root))
        with FACES_FILE.open("w", newline="") as lines:
            csv.writer(lines, lineterminator="\n").writerows(chosen)
    print(data.build(root, faces(), folder))


if __name__ == "__main__":
    main()
