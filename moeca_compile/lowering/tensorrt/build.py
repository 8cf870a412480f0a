"""A bundle's variants -> engines of TensorRT or TensorRT-RTX, kept in the bundle. No torch.

Each is built in a process of its own: TensorRT's builder may die instead of raising, and must not take others with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moeca_compile.errors import BundleError, LoweringError, OptionError
from moeca_compile.lowering.tensorrt.operators import operators_of, refuse_unsupported
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import Manifest, TensorSpec, VariantSpec
from moeca_compile.runtime.bundle.signature import signature_of
from moeca_compile.runtime.tensorrt.library import MODULES, Library, find
from moeca_compile.runtime.tensorrt.memory import Device
from moeca_compile.runtime.writing import entry_of, seal, unfinished

OPSETS = range(18, 21)  # in which attention is spelled out; as one operator it builds for some types and shapes only
ANY_BATCH = (1, 2, 8)  # of engines, where the bundle takes any
PORTABLE = ("sm_80", "sm_86", "sm_89", "sm_120")  # TensorRT-RTX's own default: it compiles for the GPU at hand later

Say = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What engines to build.

    Attributes:
        library: "tensorrt" or "tensorrt-rtx"; "": the one that is installed, classic TensorRT first.
        arch: such as ("sm_89",). Classic TensorRT builds for the GPU of this machine only; TensorRT-RTX for any that it
            knows, without a GPU too, and by default for this machine's or else for all of `PORTABLE`.
        batch: the least, the usual and the largest, where graphs take several. None: the range of the bundle, or 1, 2
            and 8 where it takes any.
        timing_cache: a file that keeps how fast kernels were from one build to the next; made if it isn't there.
    """

    library: str = ""
    arch: tuple[str, ...] = ()
    batch: tuple[int, int, int] | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.library not in ("", *MODULES):
            raise OptionError(f"library={self.library!r}: expected one of {tuple(MODULES)}")
        if wrong := [arch for arch in self.arch if not (arch.startswith("sm_") and arch[3:].isdecimal())]:
            raise OptionError(f"arch={self.arch}: {wrong} aren't like 'sm_89'")
        if self.batch is not None and not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise OptionError(f"batch={self.batch}: expected the least, the usual and the largest")


def build_engines(bundle: Bundle, request: EngineRequest | None = None, say: Say = lambda text, done: None) -> Bundle:
    """Build an engine for each variant, and put them into the bundle's `engines/` and its manifest. They replace those
    for the same architectures and version.

    Args:
        say: told what is being built, and the fraction that is done.

    Returns:
        The bundle, opened anew.

    Raises:
        BundleError: no TensorRT, a bundle that can't be written, one of several sizes, or one with prologues.
        LoweringError: an operator that TensorRT doesn't have, or a failed build.
        OptionError: architectures that the library doesn't build for, or batches that the bundle doesn't take.
    """
    if bundle.sizes:
        raise BundleError("engines are of one size and this bundle has several: export a bundle for each")
    if bundle.prologues:
        raise BundleError(
            "the bundle's variants take values of its prologues, and engines are whole: export with "
            "targets=('tensorrt',), or with prologues=False"
        )
    request = request or EngineRequest()
    batch = batches_of(bundle.manifest, request)
    library = find(request.library) if request.library else find()
    for spec, graph in zip(bundle.manifest.variants, bundle.graphs, strict=True):
        refuse_unsupported(graph, spec.file)
    arch = targets(library, request.arch)
    name = f"{'-'.join(arch)}-{library.tag}"
    entries: list[dict[str, Any]] = []
    with unfinished(bundle.path, "engines") as scratch:
        for i, (spec, graph) in enumerate(zip(bundle.manifest.variants, bundle.graphs, strict=True)):
            say(f"{library}: engine {i + 1} of {len(bundle.graphs)}", i / len(bundle.graphs))
            plan = scratch / f"{spec.name}.plan"
            shapes = profile(bundle, spec, batch)
            build(graph, bundle.path / spec.file, plan, library, arch, shapes, request.timing_cache)
            entries.append(
                {
                    "variant": spec.name, "file": f"engines/{name}/{plan.name}", "library": library.name,
                    "version": library.version, "arch": list(arch), "batch": list(batch) if shapes else None,
                }
            )  # fmt: skip
        _keep(bundle, scratch, name, entries)
    return Bundle.open(bundle.path)


def batches_of(manifest: Manifest, request: EngineRequest) -> tuple[int, int, int]:
    """The least, the usual and the largest batch to build for.

    Raises:
        OptionError: the bundle doesn't take them.
    """
    if manifest.batch is None:
        return request.batch or ANY_BATCH
    least, largest = manifest.batch
    if request.batch is None:
        return least, min(max(least, ANY_BATCH[1]), largest), largest
    if request.batch[0] < least or request.batch[2] > largest:
        raise OptionError(f"batch={request.batch}: the bundle was exported for batches {least} to {largest}")
    return request.batch


def targets(library: Library, asked: Sequence[str]) -> tuple[str, ...]:
    """The architectures to build for, in order.

    Raises:
        OptionError: the library has no such one.
        BundleError: classic TensorRT without a GPU.
    """
    if library.name == "tensorrt":
        here = Device().arch
        if asked and tuple(asked) != (here,):
            raise OptionError(f"arch={tuple(asked)}: {library} builds for this machine's GPU only, which is {here}")
        return (here,)
    buildable = [f"sm_{name[2:]}" for name in library.api.ComputeCapability.__members__ if name.startswith("SM")]
    if unknown := sorted(set(asked) - set(buildable)):
        raise OptionError(f"arch={tuple(asked)}: {library} doesn't build for {unknown}; it does for {buildable}")
    if asked:
        return tuple(sorted(set(asked), key=lambda arch: int(arch[3:])))
    try:
        here = Device().arch
    except BundleError:
        return PORTABLE
    return (here,) if here in buildable else PORTABLE


def profile(bundle: Bundle, spec: VariantSpec, batch: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
    """The optimization profile: for each input that depends on the batch its least, usual and largest sizes."""

    def depends(spec: TensorSpec) -> bool:
        return any(isinstance(dim, str) for dim in spec.shape)

    inputs, _ = signature_of(spec, bundle.manifest)
    return {name: [spec.sizes(size) for size in batch] for name, spec in inputs.items() if depends(spec)}


def build(
    graph: bytes, path: Path, plan: Path, library: Library, arch: Sequence[str],
    shapes: dict[str, list[tuple[int, ...]]], timing_cache: Path | None = None,
) -> None:  # fmt: skip
    """Build one engine in another process.

    Args:
        graph: the ONNX file's bytes.
        path: where it lies, for the weights beside it.
        plan: the file to write.
        shapes: see `profile`.

    Raises:
        LoweringError: TensorRT lacks an operator, refuses the graph, or died.
    """
    report = plan.with_suffix(".json")
    request = {
        "library": library.name, "path": str(path), "plan": str(plan), "report": str(report), "arch": list(arch),
        "shapes": shapes, "operators": sorted(operators_of(graph)),
        "timing_cache": str(timing_cache.resolve()) if timing_cache else "",
    }  # fmt: skip
    places = [str(Path(__file__).parents[3]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "moeca_compile.lowering.tensorrt.worker"],  # -P: no modules of the current folder
        input=json.dumps(request).encode() + b"\n" + graph,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
    )
    outcome = json.loads(report.read_text()) if report.exists() else {"stage": "starting"}
    report.unlink(missing_ok=True)
    if done.returncode < 0:
        raise LoweringError(
            f"{library} died ({signal.Signals(-done.returncode).name}) while {outcome['stage']} {path.name}: too "
            f"little memory, or an operator that it can't take. The graph has {', '.join(request['operators'])}"
        )
    if "error" in outcome:
        raise LoweringError(f"{library} refuses {path.name}: {outcome['error']}")
    if done.returncode or not plan.exists():
        last = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise LoweringError(f"{library}, {outcome['stage']} {path.name}: {last}")


def _keep(bundle: Bundle, scratch: Path, name: str, entries: list[dict[str, Any]]) -> None:
    """Move what was built to its place. The manifest comes last: until then the bundle is what it was."""
    data, folder = msgspec.to_builtins(bundle.manifest), bundle.path / "engines" / name
    others = [engine for engine in data.get("engines", []) if not engine["file"].startswith(f"engines/{name}/")]
    files = {k: v for k, v in data["files"].items() if not k.startswith(f"engines/{name}/")}
    files |= {entry["file"]: entry_of(scratch / Path(entry["file"]).name) for entry in entries}
    if folder.parent.is_symlink() or folder.is_symlink():
        raise BundleError(f"{str(folder)!r} is or is in a link; a bundle holds its own files")
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.chmod(0o755)
    os.rename(scratch, folder)
    seal(bundle.path, data | {"engines": [*others, *entries], "files": files})
