"""What `manifest.json` says, as data, and what must be true of it beyond its schema. No torch, no files."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from moeca_compile.errors import BundleError
from moeca_compile.graph.variant import SLOTS
from moeca_compile.runtime.bundle.schema import check
from moeca_compile.schedule import Action, Row, Schedule

FORMAT, VERSION = "moeca-bundle", 2
MANIFEST, SCHEDULE, WEIGHTS, GOLDEN = "manifest.json", "schedule.json", "weights.bin", "golden.npz"
FUSED, FUSED_ROW = "fused.onnx", "fused"  # all variants in one graph, and what it carries in place of a row
COEFFICIENTS = "coefficients"
OF_A_SIZE = ("inputs", "outputs", "state", "variants")  # entries of which each further size has its own
STEP = "moeca_step"  # a state of the fused graph, int64 [1]: how many steps were made
DROPPED = "moeca_dropped"  # an output, int64 []: how many branches found their expert's rows taken

Dim = int | str  # a size, or a multiple of the batch: "batch", "256*batch", "batch+1"
_LARGEST = 1 << 40  # elements of a tensor
_DIM = re.compile(r"(?:(\d+)\*)?batch([+-]\d+)?")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output. A dimension is a size or an expression of the batch.

    `range`: of an input that indexes a table, its least value and the one after its largest; None: not known.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    range: tuple[int, int] | None = field(default=None, kw_only=True)

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Raises:
        BundleError: there is no such tensor at this batch.
        """
        found = tuple(evaluate(dim, batch) for dim in self.shape)
        if min(found, default=0) < 0 or math.prod(found) >= _LARGEST:
            raise BundleError(f"{self} can't be at batch {batch}: its shape would be {list(found)}")
        return found

    def batch_of(self, sizes: Sequence[int]) -> int | None:
        """The batch that a tensor of these sizes has; None if it fits none, or -1 if any batch fits."""
        if len(sizes) != len(self.shape):
            return None
        found = {batch_in(dim, size) for dim, size in zip(self.shape, sizes, strict=True)} - {-1}
        if not found:
            return -1
        batch = found.pop()
        return batch if not found and batch is not None and batch > 0 else None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class StateSpec(TensorSpec):
    """A cache tensor; as an input it is called `<name>_in`, as an output `<name>_out`."""

    region: int
    output: int
    slot: str


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """One graph: `row` is its actions' letters, `takes`, `reads` and `writes` are names of inputs and state."""

    name: str
    file: str
    row: str
    takes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    coefficients: bool
    counts_dropped: bool
    macs: int


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A variant as an engine of TensorRT: it runs with this library in this version, on these architectures only.

    `batch`: the least, the usual and the largest batch that it was built for; None: the graph's one.
    """

    variant: str
    file: str
    library: str
    version: str
    arch: tuple[str, ...]
    batch: tuple[int, int, int] | None

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]

    @property
    def range(self) -> str:
        return f"batches {self.batch[0]} to {self.batch[2]}" if self.batch else "one batch"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, checked.

    A bundle may hold further sizes (resolutions): the same model, schedule and weights, with graphs of their own. Each
    is a manifest too, one of `sizes`, whose own `sizes` are empty.
    """

    data: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    variants: tuple[VariantSpec, ...]
    steps: tuple[int, ...]
    files: Mapping[str, tuple[str, int]]
    engines: tuple[EngineSpec, ...]
    sizes: tuple[Manifest, ...] = ()
    golden: str = GOLDEN

    @property
    def regions(self) -> int:
        return len(self.data["model"]["regions"])

    @property
    def timestep(self) -> str | None:
        found: str | None = self.data["timestep"]
        return found

    @property
    def dynamic_batch(self) -> bool:
        return any(isinstance(dim, str) for one in self.inputs for dim in one.shape)

    def variant_of(self, row: Row) -> int:
        letters = letters_of(row)
        return next(i for i, one in enumerate(self.variants) if one.row == letters)

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
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} isn't of a moeca bundle")
        version = data.get("version")
        if isinstance(version, int) and version > VERSION:
            raise BundleError(
                f"the bundle's format is version {version}, this package reads up to {VERSION}: update moeca-compile"
            )
        if isinstance(version, int) and 0 < version < VERSION:
            raise BundleError(
                f"the bundle's format is version {version}, this package reads {VERSION}: export it again, or open it "
                "with the moeca-compile that made it"
            )
        if wrong := check(data, _schema()):
            raise BundleError(f"{MANIFEST}: {wrong}")
        if data["digest"] != digest_of(data):
            raise BundleError(f"{MANIFEST} was changed after the export: its digest doesn't fit. Export again")
        sizes = tuple(
            cls._of({**data, **_at_size(data, size)}, golden_file(i)) for i, size in enumerate(data["sizes"], 1)
        )
        return replace(cls._of(data, GOLDEN), sizes=sizes)

    @classmethod
    def _of(cls, data: Mapping[str, Any], golden: str) -> Manifest:
        return cls(
            data=data,
            golden=golden,
            inputs=tuple(TensorSpec(**{k: _frozen(v) for k, v in one.items()}) for one in data["inputs"]),
            outputs=tuple(TensorSpec(**{k: _frozen(v) for k, v in one.items()}) for one in data["outputs"]),
            state=tuple(StateSpec(**{**one, "shape": tuple(one["shape"])}) for one in data["state"]),
            variants=tuple(VariantSpec(**{k: _frozen(v) for k, v in one.items()}) for one in data["variants"]),
            steps=tuple(data["steps"]),
            files={name: (one["sha256"], one["bytes"]) for name, one in data["files"].items()},
            engines=tuple(EngineSpec(**{k: _frozen(v) for k, v in one.items()}) for one in data.get("engines", ())),
        )

    def fit(self, schedule: Schedule) -> None:
        """Check that tables and schedule say the same.

        Raises:
            BundleError: they don't.
        """
        for one in (self, *self.sizes):
            one._fit_tables(schedule)
            _demand(one._names() == self._names(), "a further size has other names or dtypes")
        shapes = {tuple(spec.shape for spec in one.inputs) for one in (self, *self.sizes)}
        _demand(len(shapes) == 1 + len(self.sizes), "two sizes are the same")
        known = [SCHEDULE, WEIGHTS, *(one.file for one in self.engines)]
        for one in (self, *self.sizes):
            known += [one.golden, *(variant.file for variant in one.variants)]
        self._fit_engines()
        _demand(not self.sizes or not self.engines, "engines are of one size, and there are several")
        if self.data["fused"] is not None:
            known.append(FUSED)
            steps = None if schedule.period else len(schedule.rows)
            _demand(self.data["fused"] == {"file": FUSED, "steps": steps}, "the fused graph is of another schedule")
            _demand(not self.sizes, "a fused graph is of one size, and there are several")
        needed = set(known)
        _demand(set(self.files) == needed, f"files: {sorted(set(self.files) ^ needed)} are missing or too many")
        _demand(len(needed) == len(known), "two variants have the same file")

    def _fit_tables(self, schedule: Schedule) -> None:
        keys = self.data["model"]["regions"]
        _demand(schedule.adaptive is None, "the schedule is adaptive, which a bundle can't be")
        _demand(schedule.regions == tuple(keys), "the schedule is for other regions")
        _demand(schedule.fingerprint == self.data["model"]["fingerprint"], "the schedule is of another graph")
        rows = [letters_of(row) for row in schedule.rows]
        known = [one.row for one in self.variants]
        _demand(len(set(known)) == len(known), "two variants have the same row")
        _demand(sorted(known) == sorted(set(rows)), "the variants aren't the schedule's rows")
        _demand([known.index(row) for row in rows] == list(self.steps), "steps and schedule differ")
        inputs = [one.name for one in self.inputs]
        kept = [STEP, *(one.name for one in self.state)]
        _distinct([*inputs, *(f"{name}_in" for name in kept), COEFFICIENTS], "input")
        _distinct([*(one.name for one in self.outputs), *(f"{name}_out" for name in kept), DROPPED], "output")
        _demand(self.timestep is None or self.timestep in inputs, f"the timestep {self.timestep!r} is no input")
        _demand(not schedule.timesteps or self.timestep is not None, "a schedule with timesteps needs a timestep input")
        self._fit_state(schedule)
        for one in self.variants:
            self._fit_variant(one)

    def _names(self) -> list[tuple[str, str]]:
        return [(one.name, one.dtype) for one in (*self.inputs, *self.outputs, *self.state)]

    def _fit_state(self, schedule: Schedule) -> None:
        outputs: dict[int, int] = {}
        for one in self.state:
            outputs[one.region] = max(outputs.get(one.region, 0), one.output + 1)
        wanted = [
            (region, output, slot)
            for region in range(self.regions)
            for output in range(outputs.get(region, 1 if schedule.depth(region) else 0))
            for slot in SLOTS[: schedule.depth(region)]
        ]
        _demand([(o.region, o.output, o.slot) for o in self.state] == wanted, "state and schedule differ")
        names = [f"state_{i:03d}" for i in range(len(self.state))]
        _demand([one.name for one in self.state] == names, "state has other names than its places")

    def _fit_engines(self) -> None:
        """Every set of engines, which has a folder of its own, is one engine for each variant."""
        sets: dict[str, list[EngineSpec]] = {}
        for one in self.engines:
            sets.setdefault(one.folder, []).append(one)
        names = sorted(one.name for one in self.variants)
        for folder, engines in sets.items():
            _demand(sorted(one.variant for one in engines) == names, f"{folder} isn't one engine for each variant")
            made = {(one.library, one.version, one.arch) for one in engines}
            _demand(len(made) == 1, f"{folder} has engines of several kinds")

    def _fit_variant(self, one: VariantSpec) -> None:
        computed = {region for region, letter in enumerate(one.row) if letter == Action.COMPUTE.value}
        writes = tuple(s.name for s in self.state if s.region in computed and s.slot == SLOTS[0])
        readable = {s.name for s in self.state if s.region not in computed}
        _demand(one.writes == writes, f"variant {one.name} doesn't write what its row computes")
        _demand(readable.issuperset(one.reads), f"variant {one.name} reads state that its row computes")
        _demand({i.name for i in self.inputs}.issuperset(one.takes), f"variant {one.name} takes unknown inputs")


def bundle_id(schedule_sha256: str, weights_sha256: str) -> str:
    """What every graph of a bundle carries, so that none serves in another."""
    return hashlib.sha256(f"{schedule_sha256} {weights_sha256}".encode()).hexdigest()


def digest_of(data: Mapping[str, Any]) -> str:
    """The digest of a manifest, without the digest it may have."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def letters_of(row: Row) -> str:
    """A row in a bundle: one letter a region.

    Raises:
        BundleError: it recomputes parts of regions.
    """
    if not all(isinstance(action, Action) for action in row):
        raise BundleError("bundles hold rows of COMPUTE, REUSE and FORECAST; the schedule has PARTIAL ones")
    return "".join(action.value for action in row if isinstance(action, Action))


def golden_file(size: int) -> str:
    """Of the further size `size`, counted from 1."""
    return f"golden_{size}.npz"


def expression(factor: int, offset: int) -> Dim:
    """factor * batch + offset."""
    if not factor:
        return offset
    return f"{f'{factor}*' if factor != 1 else ''}batch{f'{offset:+d}' if offset else ''}"


def evaluate(dim: Dim, batch: int) -> int:
    factor, offset = parts(dim)
    return factor * batch + offset


def batch_in(dim: Dim, size: int) -> int | None:
    """The batch for which `dim` is `size`: None if there is none, -1 if any will do."""
    factor, offset = parts(dim)
    if not factor:
        return -1 if size == offset else None
    batch, rest = divmod(size - offset, factor)
    return None if rest or batch < 0 else batch


def known_dim(dim: Dim) -> bool:
    """Whether it is a size or an expression of the batch."""
    return dim > 0 if isinstance(dim, int) else _DIM.fullmatch(dim) is not None


def parts(dim: Dim) -> tuple[int, int]:
    """a and b of a * batch + b."""
    if isinstance(dim, int):
        return 0, dim
    match = _DIM.fullmatch(dim)
    assert match is not None, dim  # the schema saw to it
    return int(match[1] or 1), int(match[2] or 0)


def _at_size(data: Mapping[str, Any], size: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says differently for one of its further sizes."""
    own = {name: size[name] for name in OF_A_SIZE}
    model = {**data["model"], "baked": size["baked"]}
    golden = {**data["golden"], "steps": size["golden_steps"]}
    return {**own, "model": model, "golden": golden, "sizes": [], "engines": [], "fused": None}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BundleError(f"{MANIFEST}: {otherwise}. Export again")


def _distinct(names: Iterable[str], what: str) -> None:
    seen = list(names)
    _demand(len(set(seen)) == len(seen), f"an {what} name appears twice")


@cache
def _schema() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(files(__package__).joinpath("manifest.schema.json").read_text())
    return found
