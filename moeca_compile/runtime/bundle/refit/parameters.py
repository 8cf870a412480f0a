"""`parameters.json`: the model's parameters, and where in a bundle's weights their values lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.manifest import PARAMETERS, Dtype, File, FileSpec, Sha256
from moeca_compile.runtime.bundle.refit.recipes import Recipe, Whole, parameters_of
from moeca_compile.runtime.reading import verified

Name = Annotated[str, Meta(max_length=1000)]
Shape = Annotated[tuple[Whole, ...], Meta(max_length=16)]


class ParameterSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A parameter or buffer of the model.

    `is_fixed`: the graphs have constants that were computed with it, so that it can't be exchanged. `sha256`: of a
    fixed one's values, by which the same values are known.
    """

    dtype: Annotated[str, Meta(max_length=40)]
    shape: Shape
    is_fixed: bool = False
    sha256: Sha256 | None = None


class StoredSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A constant in a file of weights, and how it is made of parameters."""

    file: File
    offset: Whole
    dtype: Dtype
    shape: Shape
    recipe: Recipe


class ParameterTable(Struct, frozen=True, forbid_unknown_fields=True):
    """`aliases`: further names of a parameter that the model has under several."""

    parameters: dict[Name, ParameterSpec]
    aliases: dict[Name, Name]
    stored: tuple[StoredSpec, ...]

    @classmethod
    def read(cls, folder: Path, files: Mapping[str, FileSpec]) -> ParameterTable:
        """The table of a bundle.

        Raises:
            BundleError: it has none, or the table contradicts itself or the files' sizes.
        """
        if PARAMETERS not in files:
            raise BundleError(f"the bundle has no {PARAMETERS}, which weights are exchanged by: export it again")
        try:
            table = msgspec.json.decode(verified(folder, PARAMETERS, files), type=cls)
            table._check(files)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise BundleError(f"{PARAMETERS}: {error}. Export again") from None
        return table

    def write(self, folder: Path) -> None:
        """Write the table into a bundle's folder."""
        (folder / PARAMETERS).write_bytes(msgspec.json.encode(self, order="sorted"))

    def _check(self, files: Mapping[str, FileSpec]) -> None:
        for alias, name in self.aliases.items():
            if name not in self.parameters or alias in self.parameters:
                raise ValueError(f"the alias {alias!r} is of no parameter")
        for stored in self.stored:
            if unknown := set(parameters_of(stored.recipe)) - set(self.parameters):
                raise ValueError(f"a recipe is of the unknown parameters {sorted(unknown)}")
            if stored.file not in files or stored.offset + bytes_of(stored) > files[stored.file].bytes:
                raise ValueError(f"the constant at {stored.offset} is outside {stored.file}")


def bytes_of(stored: StoredSpec) -> int:
    """The size of a stored constant."""
    return math.prod(stored.shape) * ITEM_BYTES[stored.dtype]


ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
