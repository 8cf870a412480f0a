"""Nothing is believed before it ran: a written bundle against torch, on the runtimes at hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from moeca_compile.errors import BundleError, LoweringError, MoecaWarning, warn
from moeca_compile.exporting import request
from moeca_compile.exporting.arrays import to_numpy
from moeca_compile.exporting.golden import TOLERANCE, WRONG
from moeca_compile.exporting.request import Captured
from moeca_compile.frontend.arguments import Arguments, rebatched, tensors
from moeca_compile.runtime.bundle.bfloat16 import from_stored
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.bundle.manifest import FUSED
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.providers import openvino
from moeca_compile.runtime.providers.onnxruntime import CPU
from moeca_compile.runtime.session import Session

HALVES = ("bfloat16", "float16")  # not all of it runs on a CPU


def check_export(
    folder: Path,
    model: torch.nn.Module,
    examples: Sequence[Arguments],
    captured: Sequence[Captured],
    targets: Sequence[str],
    batches: Sequence[int],
    dtype: str,
) -> list[dict[str, Any]]:
    """Run what was written; `examples`, `captured`: of each size; `batches`: more batches to try.

    Raises:
        LoweringError: it gives something else than torch.
    """
    session = _opened(folder, dtype)
    if session is None:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*left out", MoecaWarning)  # an error here
        verdict = verify(session)
    if verdict.dropped:
        raise LoweringError(
            f"experts={session.manifest.expert_lowering!r}: {verdict.dropped} branches of the golden steps "
            "find their expert's rows taken. Give it a larger capacity, or experts='dense'"
        )
    errors = {"the golden steps": verdict.error}
    measured = [(session.runtime, verdict.error)]
    if openvino.NAME in targets and session.provider != openvino.NAME:
        second = Session.open(folder, openvino.NAME)
        errors["the golden steps in OpenVINO"] = verify(second).error
        measured.append((second.runtime, errors["the golden steps in OpenVINO"]))
    if session.bundle.fused is not None:
        errors[f"the golden steps with {FUSED}"] = verify(FusedSession.open(folder, session.provider)).error
    for size, (example, main) in enumerate(zip(examples, captured, strict=True)):
        of = f" of other_sizes[{size - 1}]" if size else ""
        for batch in batches:
            arguments = rebatched(example, batch)
            errors[f"a step at batch {batch}{of}"] = _error_at(session, model, arguments, main)
    worst = max(errors, key=lambda name: errors[name])
    difference = f"{worst} in {session.runtime.version()} differ from torch by {errors[worst]:.1e} of the largest value"
    if not errors[worst] <= WRONG * TOLERANCE[dtype]:
        raise LoweringError(f"{difference}: the export is wrong. dynamic_batch=False may work; please report it")
    if errors[worst] > TOLERANCE[dtype]:
        warn(f"{difference}, more than {TOLERANCE[dtype]:.0e}: a router with near-ties does that")
    return [
        {"runtime": runtime.version(), "provider": runtime.provider, "relative_error": error}
        for runtime, error in measured
    ]


def _opened(folder: Path, dtype: str) -> Session | None:
    """On onnxruntime's CPU provider; or on OpenVINO, which has bfloat16 there; else None, with a warning."""
    try:
        return Session.open(folder, CPU)
    except BundleError as error:
        if dtype not in HALVES:
            raise
        try:
            session = Session.open(folder, openvino.NAME)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MoecaWarning)
                session.run(session.bundle.golden()[0][0])  # it opens dense experts in bfloat16, and can't run them
            return session
        except BundleError:
            text = f"the bundle is written but couldn't be tried here: {error}"
            warn(text)
            return None


def _error_at(session: Session, model: torch.nn.Module, arguments: Arguments, main: Captured) -> float:
    """A whole step of the bundle against the model as it is, at a batch that no graph was captured at."""
    given = tensors(arguments)
    places = {name: main.places[placeholder] for placeholder, name in main.names.items()}
    try:
        arrays = {spec.name: to_numpy(given[places[spec.name]]) for spec in session.inputs}
        results = session.run({spec.name: from_stored(arrays[spec.name], spec.dtype) for spec in session.inputs})
    except BundleError as error:
        raise LoweringError(f"the export can't run another batch: {error}. Use dynamic_batch=False") from error
    expected = tree_leaves(request.call(model, arguments))
    return max(relative_error(results[name], expected[place].double().numpy()) for name, place in main.results)
