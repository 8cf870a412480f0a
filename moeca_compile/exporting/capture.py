"""The captures of an export: each size of the example inputs, each at the batches that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeca_compile.api import prepare
from moeca_compile.errors import CaptureError, LoweringError, OptionError
from moeca_compile.exporting import request
from moeca_compile.exporting.output import capture_output
from moeca_compile.exporting.parameters import opaque_weights
from moeca_compile.exporting.request import Captured
from moeca_compile.frontend.arguments import Arguments, rebatched
from moeca_compile.options import Options
from moeca_compile.pipeline import PORTABLE, STANDALONE, Pipeline
from moeca_compile.schedule.granularity import OUTPUT


@dataclass(frozen=True)
class BatchRange:
    """The batches that graphs are for. `largest`: None: any.

    Attributes:
        captured: the batches that graphs are captured at, three, the first and the largest within the range.
        tried: those that the written bundle is compared with the model at.
    """

    least: int = 1
    largest: int | None = None

    @property
    def captured(self) -> tuple[int, ...]:
        first = max(self.least, 2)  # torch takes 1 for a size of its own
        return first, first + 1, max(first + 5, self.largest or 0)

    @property
    def tried(self) -> tuple[int, ...]:
        if self.largest is None:
            return 1, 5
        return tuple(sorted({self.least, (self.least + self.largest) // 2, self.largest}))


def batch_range(dynamic_batch: bool | tuple[int, int]) -> BatchRange | None:
    """What `dynamic_batch` of an export says; None: the example's batch only.

    Raises:
        OptionError: neither True nor False nor two batches, the least and the largest.
    """
    if isinstance(dynamic_batch, bool):
        return BatchRange() if dynamic_batch else None
    least, largest = dynamic_batch if _is_pair(dynamic_batch) else (0, 0)
    if not 1 <= least < largest:
        raise OptionError(
            f"dynamic_batch={dynamic_batch!r}: expected True (any batch), False (the example's), or the least and the "
            "largest batch, such as (1, 8)"
        )
    return BatchRange(least, largest)


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(type(batch) is int for batch in value)


def capture_sizes(
    model: torch.nn.Module, examples: Sequence[Arguments], options: Options, batches: BatchRange | None, prologues: bool
) -> list[list[Captured]]:
    """Prepare the model and capture it.

    Args:
        model: prepared in place.
        examples: what one call gets, one for each size.
        batches: what graphs are for; None: for the example's own batch.
        prologues: whether hoisted values get graphs of their own.

    Returns:
        For each size its captures, one for each batch. The first is the one that is written.

    Raises:
        CaptureError: the model can't be called so, or isn't one graph, or has nothing to cache.
        LoweringError: its regions depend on the batch, or on the size.
    """
    pipeline = PORTABLE if prologues else STANDALONE
    report = prepare(model)
    for example in examples:
        request.try_call(model, example)
    try:
        sizes = [_capture(model, example, options, batches, pipeline) for example in examples]
    except CaptureError as error:
        reasons = opaque_weights(model)
        if report.rejected:
            some = "; ".join(map(str, report.rejected[:3]))
            reasons += f". {len(report.rejected)} expert dispatches are left as they are: {some}"
        if not reasons:
            raise
        raise CaptureError(f"{error}{reasons}") from error
    main = sizes[0][0]
    for i, (other, *_) in enumerate(sizes[1:]):
        if _shape_of(other) != _shape_of(main):
            raise LoweringError(
                f"other_sizes[{i}]: the model has other regions, inputs or outputs at this size. Export a bundle for it"
            )
    return sizes


def _shape_of(captured: Captured) -> tuple[object, ...]:
    return captured.program.regions.fingerprint, captured.called, captured.results


def _capture(
    model: torch.nn.Module, example: Arguments, options: Options, batches: BatchRange | None, pipeline: Pipeline
) -> list[Captured]:
    if batches is None:
        return [_captured(model, example, options, pipeline)]
    try:
        captures = [_captured(model, rebatched(example, batch), options, pipeline) for batch in batches.captured]
    except CaptureError as error:
        raise CaptureError(f"{error} (at another batch; dynamic_batch=False takes the example as it is)") from error
    kinds = {(captured.program.regions.fingerprint, _hoisted(captured)) for captured in captures}
    if len(kinds) > 1:
        raise LoweringError("the model's regions depend on its batch: export it with dynamic_batch=False")
    return captures


def _hoisted(captured: Captured) -> tuple[object, ...]:
    return tuple((prologue.per, prologue.gives) for prologue in captured.prologues)


def _captured(model: torch.nn.Module, arguments: Arguments, options: Options, pipeline: Pipeline) -> Captured:
    if options.granularity == OUTPUT:
        return capture_output(model, arguments, options)
    return request.capture(model, arguments, options, pipeline)
