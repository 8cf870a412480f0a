"""A package on disk: opened only when every file in it is what the manifest says. Nothing of it is loaded or run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path

from moeca_compile.errors import BundleError, ScheduleError
from moeca_compile.runtime.bundle.manifest import MANIFEST, PACKAGE_FORMAT, SCHEDULE
from moeca_compile.runtime.bundle.summary import visible
from moeca_compile.runtime.packages.manifest import WEIGHTS, PackageManifest
from moeca_compile.runtime.reading import LARGEST_TEXT, read, verified
from moeca_compile.schedule import Schedule


def is_package(path: str | Path) -> bool:
    """Whether a directory has a manifest of a package. Nothing else of it is checked."""
    try:
        data = json.loads((Path(path) / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == PACKAGE_FORMAT


@dataclass(frozen=True, repr=False)
class Package:
    """A saved model, verified. `moeca_compile.load` runs it.

    Attributes:
        path: the directory.
        manifest: what is in it.
        schedule: fitted to the model's regions.
    """

    path: Path
    manifest: PackageManifest
    schedule: Schedule

    @classmethod
    def open(cls, path: str | Path) -> Package:
        """Read a package. The checksum of every file is verified first.

        Args:
            path: the directory that `moeca_compile.save` made.

        Raises:
            BundleError: a file is missing, changed, contradictory, newer, or outside the directory.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{str(path)!r} is no directory; a package is one, made by moeca_compile.save")
        manifest = PackageManifest.parse(read(folder, MANIFEST, LARGEST_TEXT))
        try:
            schedule = Schedule.from_json(verified(folder, SCHEDULE, manifest.files).decode())
        except (ScheduleError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{SCHEDULE}: {error}") from error
        _check(manifest, schedule)
        for name in manifest.files:
            verified(folder, name, manifest.files, keep=False)
        return cls(folder, manifest, schedule)

    @property
    def bytes(self) -> int:
        """Of all files in the directory that the manifest knows, itself among them."""
        return sum(file.bytes for file in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size

    def __repr__(self) -> str:
        return f"Package({str(self.path)!r}, {len(self.manifest.sizes[0].variants)} variants)"

    def __str__(self) -> str:
        lines = [f"package      {self.path}"]
        for name, value in self.facts().items():
            lines.append(f"{name:<13}{value.replace(chr(10), chr(10) + ' ' * 13)}")
        return visible("\n".join(lines))

    def facts(self) -> dict[str, str]:
        """What is in it, by name; several lines where there are several."""
        manifest, size = self.manifest, self.manifest.sizes[0]
        machine = manifest.made_for
        full = size.variants[0].macs or 1
        variants = [f"{variant.name}: {variant.macs / full:.1%} of a full step" for variant in size.variants]
        lines = {
            "model": f"{manifest.model.name}, {len(self.schedule.regions or ())} regions, {manifest.model.dtype}",
            "calls": "\n".join(map(str, manifest.sizes)),
            "schedule": f"{self.schedule.made_by}, {len(self.schedule.rows)} rows",
            "variants": "\n".join(variants),
            "prologues": "\n".join(f"{prologue.name}: {len(prologue.gives)} values" for prologue in size.prologues),
            "state": f"{len(size.state)} tensors, {sum(slot.bytes for slot in size.state) / 2**20:.1f} MiB",
            "for": ", ".join(filter(None, [f"torch {machine.torch}", machine.machine, machine.processor])),
            "error": f"{manifest.relative_error:.1e} of the largest value of eager torch",
            "made with": ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()),
            "size": f"{self.bytes / 2**20:.1f} MiB, weights {manifest.files[WEIGHTS].bytes / 2**20:.1f} MiB",
        }
        return {name: value for name, value in lines.items() if value}


def _check(manifest: PackageManifest, schedule: Schedule) -> None:
    files = {SCHEDULE, WEIGHTS}
    for size in manifest.sizes:
        programs = (*size.variants, *size.prologues)
        files |= {program.file for program in programs}
        _demand(len(size.variants) == len(schedule.distinct_rows()), "the variants aren't the schedule's rows")
        for program in programs:
            _demand(_fits(program.takes, size.arguments), f"{program.name} takes an unknown input")
            _demand(_fits((*program.reads, *program.writes), size.state), f"{program.name} has an unknown state")
            _demand(_fits((*program.hoists, *program.gives), size.hoisted), f"{program.name} has an unknown value")
        roles = [*size.timesteps, *size.condition, *([] if size.latent is None else [size.latent])]
        _demand(_fits(roles, size.arguments), "a role is of no input")
        leaves = [entry.leaf for entry in size.arguments] + [entry.leaf for entry in size.results]
        _demand(_fits([leaf for leaf in leaves if leaf is not None], size.leaves), "a tensor is of no argument")
    _demand(files == set(manifest.files), f"files: {sorted(files ^ set(manifest.files))} are missing or too many")


def _fits(places: Iterable[int], table: Sized) -> bool:
    return all(place < len(table) for place in places)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BundleError(f"{MANIFEST}: {otherwise}. Save the package again")
