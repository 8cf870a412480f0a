"""What an export can't do, said before anything is captured."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeca_compile.errors import LoweringError, OptionError
from moeca_compile.frontend.arguments import Arguments, rebatched, tensors
from moeca_compile.lowering.experts.choose import FORMS
from moeca_compile.lowering.onnx.lower import OPSETS
from moeca_compile.lowering.tensorrt import build as tensorrt
from moeca_compile.runtime.bundle.manifest import FUSED
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.granularity import OUTPUT

AOTI = "aoti"  # the target that is a package, and no bundle
TARGETS = (*FORMS, AOTI)


def refuse_request(model: torch.nn.Module, targets: Sequence[str], opset: int) -> None:
    """Raises:
    OptionError: targets or an opset that there aren't, packages that are missing, no module.
    LoweringError: a model in training mode.
    """
    if unknown := [name for name in targets if name not in TARGETS] or (["nothing"] if not targets else []):
        raise OptionError(f"targets={list(targets)}: {', '.join(unknown)} can't be exported to; there are {TARGETS}")
    opsets = tensorrt.OPSETS if "tensorrt" in targets else OPSETS
    if opset not in opsets:
        remedy = "Leave opset out"
        if opset in OPSETS and len(targets) > 1:
            remedy += ", or export a bundle of its own for 'tensorrt', which takes no Attention operator"
        raise OptionError(
            f"opset={opset}: expected {opsets.start} to {opsets.stop - 1} for targets={list(targets)}. {remedy}"
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"export needs {', '.join(missing)}: pip install 'moeca-compile[onnx]'")
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"export takes a torch.nn.Module, not {type(model).__name__}")
    if model.training:
        raise LoweringError("the model is in training mode: call model.eval() first")


def refuse_beside_native(targets: Sequence[str], dynamic_batch: bool, others: Mapping[str, bool]) -> None:
    """Refuse what a package can't be.

    Args:
        targets: of the export, the native one among them.
        dynamic_batch: of the export.
        others: by name of an argument, whether it was given.

    Raises:
        OptionError: other targets beside it, any batch, or an argument that is for bundles.
    """
    if len(targets) > 1:
        raise OptionError(f"targets={list(targets)}: {AOTI!r} makes a package and no bundle: export it by itself")
    if dynamic_batch:
        raise OptionError(
            f"targets={AOTI!r}: a package is for the batches of its examples. Pass dynamic_batch=False, and examples "
            "with other batches as other_sizes"
        )
    given = sorted(name for name, is_given in others.items() if is_given)
    if given:
        raise OptionError(f"{', '.join(given)}: for bundles alone; leave it out for targets={AOTI!r}")


def refuse_sizes(
    example: Arguments, other_sizes: Sequence[Arguments], targets: Sequence[str], dynamic_batch: bool, fused: bool
) -> None:
    """Raises:
    OptionError: no list of example inputs, one size twice, or something that has one size only.
    """
    if not _is_call(example):
        raise OptionError(
            f"example_inputs: expected a tuple or a mapping of keywords, got {type(example).__name__}; for a single "
            "positional argument write (x,)"
        )
    if other_sizes and (isinstance(other_sizes, Mapping) or not all(map(_is_call, other_sizes))):
        raise OptionError("other_sizes: expected a list of example inputs, each a tuple or a mapping of keywords")
    if other_sizes and (fused or "tensorrt" in targets):
        what = f"{FUSED} is" if fused else "the engines of the target 'tensorrt' are"
        raise OptionError(f"other_sizes: {what} of one size; export a bundle for each")
    earlier: list[list[torch.Size]] = []
    for call in (example, *other_sizes) if other_sizes else ():
        alike = rebatched(call, 1) if dynamic_batch else call
        shapes = [tensor.shape for tensor in tensors(alike)]
        if shapes in earlier:
            raise OptionError("other_sizes: the same sizes twice" + (", but for the batch" if dynamic_batch else ""))
        earlier.append(shapes)


def _is_call(example: Any) -> bool:
    return isinstance(example, (tuple, list, Mapping))


def has_prologues(asked: bool | None, targets: Sequence[str], granularity: str, fused: bool) -> bool:
    """Whether hoisted values get graphs of their own: where nothing asks for graphs that stand by themselves.

    Raises:
        OptionError: both are asked for.
    """
    reasons = ["fused=True"] if fused else []
    reasons += ["the target 'tensorrt'"] if "tensorrt" in targets else []
    reasons += ["granularity='output'"] if granularity == OUTPUT else []
    if asked and reasons:
        raise OptionError(
            f"prologues=True: {reasons[0]} takes whole graphs. Leave prologues out, or export a bundle for each"
        )
    return not reasons if asked is None else asked


def refuse_schedule(schedule: Schedule, granularity: str, fused: bool) -> None:
    """Raises:
    LoweringError: a fused graph of a schedule that is adaptive or has PARTIAL rows.
    OptionError: a fused graph of what has one graph.
    """
    if granularity == OUTPUT and fused:
        raise OptionError(
            f"fused=True: with granularity='output' a cheap step runs no graph, so there are no variants to put into "
            f"{FUSED}. Leave fused out; a Session runs the sums of a cheap step itself"
        )
    if fused and schedule.adaptive is not None:
        raise LoweringError(
            f"{FUSED} has a fixed table of steps, and the rows of an adaptive schedule are chosen while a trajectory "
            "runs: export with fused=False"
        )
    if fused and not all(isinstance(act, Action) for row in schedule.rows for act in row):
        raise LoweringError(
            f"{FUSED} holds rows of COMPUTE, REUSE and FORECAST alone, and the schedule has PARTIAL ones: export with "
            "fused=False"
        )
