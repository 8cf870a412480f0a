"""Compiles the variants of one captured graph: with Inductor or without, and recorded as CUDA graphs on request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._guards import CompileId

from moeca_compile.errors import OptionError
from moeca_compile.graph.autocast import autocast_is, without_autocast
from moeca_compile.graph.capture import Input
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.ahead import ask_compiler, compiles_on_cpu
from moeca_compile.lowering.inductor.lower import AtOtherSize, Executable, lower_eager
from moeca_compile.lowering.inductor.replay import RECORDERS, Record, Replayed
from moeca_compile.lowering.inductor.sizes.shared import SharedSizes
from moeca_compile.options import Options
from moeca_compile.passes.manager import PassRecord
from moeca_compile.pipeline import lower

log = logging.getLogger(__name__)


class Compiler:
    """Compiles the variants and prologues of one graph.

    Args:
        options: of the handle.
        args: of the call that the graph was captured for.
        sizes: programs of the handle that serve several sizes; default: each size is compiled for itself.

    Attributes:
        inputs: of the captured graph; set after the capture.
        writes_kernels: whether Inductor generates C++ for these tensors.
        records: one for each pass that ran.
        seconds: seconds by name of a variant; also `capture` and `kernels`.
        spent: their sum.
        record: records a program as a CUDA graph; None: nothing is recorded.
        compile_id: of Dynamo's compile that the graph came from; None: it is unknown.
        replaying: a lock that is held from the start of a replay until its results are committed.
    """

    def __init__(self, options: Options, args: Sequence[Any], sizes: SharedSizes | None = None) -> None:
        self.options = options
        self._sizes = sizes if options.share_sizes else None
        self.inputs: Sequence[Input] = ()
        self.writes_kernels = options.inner == "inductor" and compiles_on_cpu(args)
        if self.writes_kernels:
            ask_compiler()
        self.records: list[PassRecord] = []
        self.seconds: dict[str, float] = {}
        self.spent = 0.0
        self.record: Record | None = None
        self.compile_id: CompileId | None = None
        self.replaying: AbstractContextManager[Any] = nullcontext()

    def start_recording(self, args: Sequence[Any]) -> None:
        """From now on record what is compiled as CUDA graphs, for calls like `args`.

        Raises:
            OptionError: the tensors aren't on one GPU.
        """
        self.record, self.replaying = _recorder(args), threading.RLock()

    def lower(
        self, variant: Variant, args: Sequence[Any], often: bool = True, other: AtOtherSize = lambda: None
    ) -> Executable:
        """Compile a variant for tensors like `args`.

        Args:
            variant: to compile.
            args: of the variant.
            often: the variant runs at many steps of a trajectory. False: it runs in the interpreter, unrecorded.
            other: the variant at another size; gives None: it isn't known.

        Raises:
            LoweringError: the inner compiler refused it.
        """
        begin = time.perf_counter()
        records: Sequence[PassRecord] = ()
        if self.options.inner == "eager" or not often:
            run = lower_eager(variant)
        else:
            with autocast_is(()):
                compiled, records = lower(variant, args, self.options, self._sizes, other)
            run = without_autocast(compiled)
        self.note(variant.name, begin, records)
        if self.record is None or not often:
            return run
        return Replayed(run, variant.name, self._moving(variant, len(args)), self.record, variant.outputs)

    def note(self, name: str, begin: float, records: Sequence[PassRecord] = ()) -> None:
        """Add the time since `begin` (`time.perf_counter`) to the seconds of `name`."""
        seconds = time.perf_counter() - begin
        self.records += records
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.spent += seconds
        log.info("%s: %.2f s, %d passes", name, seconds, len(records))

    def _moving(self, variant: Variant, count: int) -> set[int]:
        """Positions of a variant's `count` arguments that are other tensors at each call: all but weights and state."""
        inputs = [position for position, i in enumerate(variant.takes) if not self.inputs[i].is_weight]
        first = len(variant.takes) + len(variant.hoists)
        return {*inputs, *range(len(variant.takes), first), *range(first + len(variant.reads), count)}


def _recorder(args: Sequence[Any]) -> Record:
    devices = {arg.device.type for arg in args if isinstance(arg, torch.Tensor)}
    recorder = RECORDERS.get(next(iter(devices))) if len(devices) == 1 else None
    if recorder is None:
        raise OptionError(
            f"cuda_graphs=True, but this call's tensors are on {', '.join(sorted(devices)) or 'no device'}: leave "
            "it out, or move the model and all its inputs to a GPU"
        )
    return recorder
