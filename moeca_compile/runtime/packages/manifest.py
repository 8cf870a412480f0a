"""The types of a package's `manifest.json`. No torch, no files.

A package holds what a step needs of a program (`engine/program.py`): how a call becomes the arguments of the graph, the
layout of the state, each variant and prologue with what it takes and gives, and how results become the model's own.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from moeca_compile.errors import BundleError
from moeca_compile.graph.variant import StateSlot, Variant
from moeca_compile.runtime.bundle.manifest import FORMAT as BUNDLE
from moeca_compile.runtime.bundle.manifest import (
    MANIFEST,
    PACKAGE_FORMAT,
    Dtype,
    File,
    FileSpec,
    Sha256,
    Text,
    digest_of,
)
from moeca_compile.schedule import Row

VERSION = 1
WEIGHTS = "weights.pt"

Place = Annotated[int, Meta(ge=0, le=1_000_000)]
Places = Annotated[tuple[Place, ...], Meta(max_length=1_000_000)]
Sizes = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=64)]


class TensorLeaf(Struct, frozen=True, forbid_unknown_fields=True, tag="tensor"):
    """An argument of a call that is a tensor. `name`: as an error calls it."""

    name: Text
    dtype: Dtype
    shape: Sizes

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}"


class ValueLeaf(Struct, frozen=True, forbid_unknown_fields=True, tag="value"):
    """An argument of a call, or a part of its result, that is no tensor: it is the same in every call.

    `of`: "plain" for what JSON has, "dtype" or "device" for torch's.
    """

    name: Text
    of: str
    value: bool | int | float | str | None

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


class Argument(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An argument of the graph: a weight by name, or the leaf of the call at a position."""

    weight: Text = ""
    leaf: Place | None = None


class Result(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A leaf of the result: an output of the graph, a leaf of the call that is handed through, or a value."""

    output: Place | None = None
    leaf: Place | None = None
    value: ValueLeaf | None = None


class StateSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A slot of the state; see `graph/variant.py`. `region`: -1: it is of the whole graph."""

    name: Text
    region: Annotated[int, Meta(ge=-1, le=1_000_000)]
    output: Place
    slot: Text
    shape: Sizes
    dtype: Dtype
    bytes: Annotated[int, Meta(ge=0)]

    def slot_of_layout(self) -> StateSlot:
        """The slot as the engine has it."""
        return StateSlot(**msgspec.structs.asdict(self), device="cpu")


class HoistedSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A value that several calls share; see `graph/regions.py`."""

    level: Annotated[str, Meta(pattern=r"^(invariant|step)\Z")]
    bytes: Annotated[int, Meta(ge=0)]


class ProgramSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A variant or prologue; see `graph/variant.py`. `gives`: the hoisted values that a prologue computes."""

    name: Text
    file: File
    takes: Places
    reads: Places
    writes: Places
    coefficients: bool
    now: bool
    outputs: Place
    hoists: Places
    macs: Annotated[int, Meta(ge=0)]
    gives: Places = ()

    def variant(self, row: Row) -> Variant:
        """The variant as the engine has it, without a graph."""
        return Variant(
            self.name, row, None, self.takes, self.reads, self.writes, self.coefficients, self.now, self.outputs,
            self.hoists, self.macs,
        )  # fmt: skip


class SizeSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of call: its shapes and dtypes, and the programs for it.

    Attributes:
        call, result: structure of the arguments and of the result, as torch's pytree module writes it.
        leaves: of the call.
        autocast: device and dtype of each autocast that was on.
        arguments: of the graph.
        results: one for each leaf of the result.
        timesteps, latent, condition: positions of these inputs among `arguments`.
        variants: in the order of the schedule's distinct rows.
    """

    call: str
    leaves: tuple[TensorLeaf | ValueLeaf, ...]
    autocast: tuple[tuple[Text, Text], ...]
    arguments: tuple[Argument, ...]
    result: str
    results: tuple[Result, ...]
    timesteps: Places
    latent: Place | None
    condition: Places
    state: tuple[StateSpec, ...]
    hoisted: tuple[HoistedSpec, ...]
    variants: Annotated[tuple[ProgramSpec, ...], Meta(min_length=1)]
    prologues: tuple[ProgramSpec, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.leaves))


class MachineSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What native code runs on.

    Attributes:
        torch: its version.
        machine: the architecture, such as x86_64.
        processor: its name; "" where it isn't known.
        features: instructions that the processor has beyond its architecture; empty where they aren't known.
    """

    torch: Text
    machine: Text
    processor: Text
    features: tuple[Text, ...]


class ParameterSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter of the model's `forward`. `default`: None: it has none."""

    name: Text
    kind: Annotated[int, Meta(ge=0, le=4)]
    default: ValueLeaf | None


class ModelSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The model. `modules`: Python modules with the types of its arguments and results."""

    name: Text
    dtype: Dtype
    parameters: tuple[ParameterSpec, ...]
    modules: tuple[Text, ...]
    config: dict[str, Any] | None


class PackageManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """`manifest.json` of a package, decoded.

    Attributes:
        digest: of the manifest without its digest.
        made_for: the machine that it was compiled on.
        latent_jump, pack_experts: as in `Options`.
        relative_error: of the steps that were run when it was saved, relative to the largest value of eager torch.
    """

    format: str
    version: int
    digest: Sha256
    made_with: dict[str, Text]
    made_for: MachineSpec
    model: ModelSpec
    latent_jump: float
    pack_experts: bool
    relative_error: float
    sizes: Annotated[tuple[SizeSpec, ...], Meta(min_length=1, max_length=100)]
    files: dict[File, FileSpec]

    @classmethod
    def parse(cls, raw: bytes) -> PackageManifest:
        """Read and check everything that needs no other file.

        Raises:
            BundleError: not a package's manifest, another version of the format, or a changed entry.
        """
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} isn't JSON: {error}") from None
        form = data.get("format") if isinstance(data, dict) else None
        if form == BUNDLE:
            raise BundleError("this is a bundle of ONNX graphs: open it with moeca_compile.runtime.Session.open")
        if form != PACKAGE_FORMAT:
            raise BundleError(f"{MANIFEST} isn't of a package that moeca_compile.save made")
        if data.get("version") != VERSION:
            raise BundleError(
                f"the package's format is version {data.get('version')}, and this moeca-compile reads {VERSION}: save "
                "it again with this one, or open it with the one that made it"
            )
        try:
            manifest = msgspec.convert(data, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise BundleError(f"{MANIFEST}: {error}. Save the package again") from None
        if manifest.digest != digest_of(data):
            raise BundleError(f"{MANIFEST} was changed after the package was saved: its digest doesn't fit")
        return manifest
