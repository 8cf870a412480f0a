"""The types of `manifest.json`: what a bundle may say, entry by entry. No torch, no files.

msgspec decodes into these types. Its error names the path of the first wrong entry and what was expected there.
`consistency.py` checks what must hold between entries.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from moeca_compile.dtypes import DTYPES
from moeca_compile.errors import BundleError
from moeca_compile.graph.variant import Slot
from moeca_compile.runtime.bundle.dims import DIM_PATTERN, batch_in, evaluate
from moeca_compile.schedule.granularity import OUTPUT

FORMAT, VERSION = "moeca-bundle", 5
OLDEST = 2  # an older manifest is one of today without the entries that came since; `signature.py` knows the graphs
PACKAGE_FORMAT = "moeca-package"  # of `runtime/packages`
MANIFEST, SCHEDULE, WEIGHTS, GOLDEN = "manifest.json", "schedule.json", "weights.bin", "golden.npz"
PARAMETERS = "parameters.json"  # the model's parameters, and where their values lie
CHANGED = "changed.bin"  # weights that were exchanged, beside those of the bundle that they were exchanged in
FUSED, FUSED_ROW = "fused.onnx", "fused"  # all variants in one graph, and what it carries in place of a row
COEFFICIENTS = "coefficients"
NOW = "moeca_now"  # an input, float32 []: step + 1, for values that age one by one
STEP = "moeca_step"  # a state of the fused graph, int64 [1]: how many steps were made
DROPPED = "moeca_dropped"  # an output, int64 []: how many branches found their expert's rows taken

_LARGEST = 1 << 40  # elements of a tensor
_MAX = sys.float_info.max

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=1000)]
Name = Annotated[str, Meta(pattern=r"^[^\s/\\]+\Z", max_length=1000)]
Names = Annotated[tuple[Name, ...], Meta(max_length=100_000)]
File = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\Z", max_length=200)]
_PLAN = r"engines/[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*[.]plan"
EngineFile = Annotated[str, Meta(pattern=rf"^{_PLAN}\Z", max_length=200)]
AnyFile = Annotated[str, Meta(pattern=rf"^([A-Za-z0-9_][A-Za-z0-9_.-]*|{_PLAN})\Z", max_length=200)]
Dtype = Annotated[str, Meta(pattern=rf"^({'|'.join(DTYPES)})\Z")]
Size = Annotated[int, Meta(ge=0, le=2147483647)] | Annotated[str, Meta(pattern=DIM_PATTERN, max_length=40)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=16)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Error = Annotated[float, Meta(ge=0, le=_MAX)]
Baked = dict[str, Annotated[float, Meta(ge=-_MAX, le=_MAX)]]
Target = Annotated[str, Meta(pattern=r"^(onnx|openvino|cuda|tensorrt)\Z")]
Library = Annotated[str, Meta(pattern=r"^(tensorrt|tensorrt-rtx)\Z")]
LibraryVersion = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)*([a-z0-9.+-]*)\Z", max_length=40)]
Arch = Annotated[str, Meta(pattern=r"^sm_[0-9]+\Z", max_length=20)]
Experts = Annotated[str, Meta(pattern=r"^(none|segments|dense|moe|capacity:[0-9]+(\.[0-9]+)?)\Z", max_length=40)]


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A named input or output. A dimension is a size or an expression of the batch."""

    name: Name
    dtype: Dtype
    shape: Shape

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Raises:
        BundleError: there is no such tensor at this batch.
        """
        sizes = tuple(evaluate(dim, batch) for dim in self.shape)
        if min(sizes, default=0) < 0 or math.prod(sizes) >= _LARGEST:
            raise BundleError(f"{self} can't be at batch {batch}: its shape would be {list(sizes)}")
        return sizes

    def batch_of(self, sizes: Sequence[int]) -> int | None:
        """The batch that a tensor of these sizes has; None if it fits none, or -1 if any batch fits."""
        if len(sizes) != len(self.shape):
            return None
        batches = {batch_in(dim, size) for dim, size in zip(self.shape, sizes, strict=True)} - {-1}
        if not batches:
            return -1
        batch = batches.pop()
        return batch if not batches and batch is not None and batch > 0 else None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


class InputSpec(TensorSpec, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`range`: of an input that indexes a table, its least value and the one after its largest; None: not known."""

    range: tuple[int, int] | None = None


class StateSpec(TensorSpec, frozen=True, forbid_unknown_fields=True):
    """A cache tensor; as an input it is called `<name>_in`, as an output `<name>_out`. Region -1 is the whole
    graph."""

    region: Annotated[int, Meta(ge=-1, le=100_000)]
    output: Annotated[int, Meta(ge=0, le=1000)]
    slot: Annotated[str, Meta(pattern=rf"^({'|'.join(Slot)})\Z")]


class VariantSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One graph: `row` is its actions' letters, as the schedule's file writes them; `takes`, `reads` and `writes` are
    names of inputs and state.

    `counts_dropped`: whether `moeca_dropped` is an output: branches without a row in their expert's capacity.
    `now`: whether `moeca_now` is an input. `hoists`: the hoisted values that it takes.
    """

    name: Name
    file: File
    row: Annotated[str, Meta(pattern=r"^[CRFa-z]*\Z", max_length=100_000)]
    takes: Names
    reads: Names
    writes: Names
    coefficients: bool
    counts_dropped: bool
    macs: Annotated[int, Meta(ge=0)]
    now: bool = False
    hoists: Names = ()


class PrologueSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A graph of hoisted values, which don't depend on the latent. It takes inputs and hoisted values (`hoists`), and
    `gives` hoisted values, that hold for a trajectory or for a step."""

    per: Annotated[str, Meta(pattern=r"^(trajectory|step)\Z")]
    file: File
    takes: Names
    hoists: Names
    gives: Names

    @property
    def name(self) -> str:
        return f"prologue_{self.per}"

    @property
    def row(self) -> str:
        """What the graph carries in place of a row."""
        return self.name


GraphSpec = VariantSpec | PrologueSpec


class EngineSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A variant as an engine of TensorRT: it runs with this library in this version, on these architectures only.

    `batch`: the least, the usual and the largest batch that it was built for; None: the graph's one.
    """

    variant: Name
    file: EngineFile
    library: Library
    version: LibraryVersion
    arch: Annotated[tuple[Arch, ...], Meta(min_length=1, max_length=100)]
    batch: tuple[Count, Count, Count] | None

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]

    @property
    def range(self) -> str:
        return f"batches {self.batch[0]} to {self.batch[2]}" if self.batch else "one batch"


class ModelSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """`baked`: arguments that were numbers, and are constants of the graphs."""

    name: Text
    fingerprint: Annotated[str, Meta(max_length=100)]
    regions: Annotated[tuple[Text, ...], Meta(max_length=100_000)]
    baked: Baked


class FusedSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """`steps`: how many steps the graph can count; None: any number."""

    file: Annotated[str, Meta(pattern=r"^fused\.onnx\Z")]
    steps: Count | None


class MeasuredSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The error of the golden steps where the bundle was exported, relative to the largest recorded value."""

    runtime: Text
    provider: Text
    relative_error: Error


GoldenSteps = Annotated[int, Meta(ge=1, le=100_000)]


class GoldenSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The recorded steps: how many, and the relative error that a runtime may have. `by`: the runtime that gave the
    outputs; "": torch did."""

    steps: GoldenSteps
    tolerance: Error
    measured: tuple[MeasuredSpec, ...]
    by: Text = ""


class FileSpec(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


Inputs = Annotated[tuple[InputSpec, ...], Meta(min_length=1, max_length=1000)]
Outputs = Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1000)]
State = Annotated[tuple[StateSpec, ...], Meta(max_length=100_000)]
Variants = Annotated[tuple[VariantSpec, ...], Meta(min_length=1, max_length=10_000)]
Hoisted = Annotated[tuple[TensorSpec, ...], Meta(max_length=100_000)]
Prologues = Annotated[tuple[PrologueSpec, ...], Meta(max_length=2)]
OF_SIZE = ("inputs", "outputs", "state", "variants", "hoisted", "prologues")  # entries that each size has its own of


class SizeSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a further size (resolution) says differently. Its golden steps are in golden_1.npz, golden_2.npz, ..."""

    inputs: Inputs
    outputs: Outputs
    state: State
    variants: Variants
    baked: Baked
    golden_steps: GoldenSteps
    hoisted: Hoisted = ()
    prologues: Prologues = ()


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`manifest.json`, decoded.

    Attributes:
        digest: of the manifest without its digest, as JSON with sorted keys and no spaces.
        id: of schedule and weights; every graph carries it.
        steps: the variant of each row of the schedule; None: the row runs no graph.
        granularity: of the schedule, where it isn't one of regions: `output`, where the one variant is the whole model.
        hoisted: values that the prologues give, in their order; an input of a graph is called `<name>_in`, an output
            `<name>_out`.
        prologues: graphs of values that don't depend on the latent.
        latent: the input that the model's output is a change of, where the model's output is cached; None: not known.
        batch: the least and the largest batch that a call may have; None: any that the shapes allow.
        base: id of the bundle whose weights were exchanged; None: these are the weights that were exported.
        sizes: further resolutions: the same model, schedule and weights, with graphs of their own.
    """

    format: str
    version: int
    digest: Sha256
    id: Sha256
    made_with: dict[str, Text]
    model: ModelSpec
    opset: Annotated[int, Meta(ge=18, le=100)]
    dtype: Dtype
    targets: Annotated[tuple[Target, ...], Meta(min_length=1)]
    expert_lowering: Experts
    inputs: Inputs
    outputs: Outputs
    state: State
    timestep: Name | None
    variants: Variants
    steps: Annotated[tuple[Annotated[int, Meta(ge=0, le=10_000)] | None, ...], Meta(min_length=1, max_length=1_000_000)]
    fused: FusedSpec | None
    sizes: Annotated[tuple[SizeSpec, ...], Meta(max_length=100)]
    files: dict[AnyFile, FileSpec]
    golden: GoldenSpec
    engines: Annotated[tuple[EngineSpec, ...], Meta(max_length=100_000)] = ()
    granularity: Annotated[str, Meta(pattern=r"^(output)?\Z")] = ""
    latent: Name | None = None
    hoisted: Hoisted = ()
    prologues: Prologues = ()
    base: Sha256 | None = None
    batch: tuple[Count, Count] | None = None

    @property
    def caches_output(self) -> bool:
        """Whether the model's output is cached as a whole: cheap steps run no graph."""
        return self.granularity == OUTPUT

    @property
    def regions(self) -> int:
        """How many there are."""
        return len(self.model.regions)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that the graphs read weights from."""
        return (WEIGHTS, CHANGED) if CHANGED in self.files else (WEIGHTS,)

    @property
    def dynamic_batch(self) -> bool:
        return any(isinstance(dim, str) for spec in self.inputs for dim in spec.shape)

    def further_sizes(self) -> Iterator[Manifest]:
        """The manifest at each of `sizes`."""
        for size in self.sizes:
            yield msgspec.structs.replace(
                self,
                **{name: getattr(size, name) for name in OF_SIZE},
                model=msgspec.structs.replace(self.model, baked=size.baked),
                golden=msgspec.structs.replace(self.golden, steps=size.golden_steps),
                sizes=(),
                engines=(),
                fused=None,
            )

    @classmethod
    def parse(cls, raw: bytes) -> Manifest:
        """Read and check everything that needs no other file.

        Raises:
            BundleError: not a manifest, another version of the format, a changed or contradictory entry.
        """
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} isn't JSON: {error}") from None
        if isinstance(data, dict) and data.get("format") == PACKAGE_FORMAT:
            raise BundleError("this is a package of native code, and no bundle: moeca_compile.load opens it")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} isn't of a moeca bundle")
        version = data.get("version")
        if isinstance(version, int) and version > VERSION:
            raise BundleError(
                f"the bundle's format is version {version}, this package reads up to {VERSION}: update moeca-compile"
            )
        if isinstance(version, int) and 0 < version < OLDEST:
            raise BundleError(
                f"the bundle's format is version {version}, this package reads {OLDEST} to {VERSION}: export it "
                "again with moeca_compile.export(model, inputs, schedule, path), or open it with the moeca-compile "
                "that made it"
            )
        try:
            manifest = msgspec.convert(data, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise BundleError(f"{MANIFEST}: {error}. Export again") from None
        if manifest.digest != digest_of(data):
            raise BundleError(f"{MANIFEST} was changed after the export: its digest doesn't fit. Export again")
        return manifest


def bundle_id(schedule_sha256: str, *weights_sha256: str) -> str:
    """What every graph of a bundle carries, so that none serves in another."""
    return hashlib.sha256(" ".join((schedule_sha256, *weights_sha256)).encode()).hexdigest()


def digest_of(data: Mapping[str, Any]) -> str:
    """The digest of a manifest, without the digest it may have."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def golden_file(size: int) -> str:
    """The golden steps of the size `size`; 0 is the bundle's own."""
    return f"golden_{size}.npz" if size else GOLDEN
