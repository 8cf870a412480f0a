"""An exported program -> an onnx_ir model, by torch's translator, without work that has no effect on our graphs.

The translator would parse the source of its 500 translations for each graph, and trace each graph once more to
decompose operators that it has no translation for, whether there are any or not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph
from torch.fx import config as fx_config

from moeca_compile.graph.fx import aten
from moeca_compile.lowering.onnx.optimizer import optimizing_once

_REGISTRY = "torch.onnx._internal.exporter._registration"
_TALKATIVE = (_REGISTRY, "onnx_ir.passes.common.initializer_deduplication")
_alone = threading.Lock()  # while the translator's registry is replaced


def translate(exported: torch.export.ExportedProgram, opset: int, table: Mapping[Any, Callable[..., Any]]) -> Any:
    """The optimized onnx_ir.Model of a program.

    Args:
        exported: of a graph without side effects, exported under `tracing_quietly`.
        opset: of the standard ONNX domain.
        table: translations of operators that torch has none for, or another one.
    """
    with _alone, optimizing_once(), _registry_read_once(opset) as is_translated:
        _decompose_only_what_must_be(
            exported, lambda one: one in table or one.namespace == "onnx" or is_translated(one)
        )
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=opset, custom_translation_table=dict(table), optimize=True,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model


@contextlib.contextmanager
def tracing_quietly() -> Iterator[None]:
    """Without the translator's talk of packages that aren't there, of its own next version, and of weights that are
    outputs too; and without the stack traces that torch writes down for every node of its traces: these are lines of
    torch, nothing of them is in the ONNX graph, and they take a tenth of the time."""
    logs = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [log.level for log in logs]
    config: Any = fx_config  # a version without this option reads nothing there
    before = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.do_not_emit_stack_traces = before
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _decompose_only_what_must_be(
    exported: torch.export.ExportedProgram, is_translated: Callable[[OpOverload], bool]
) -> None:
    """Let the translator take the program as it is where the decomposition would only trace it again."""
    decompose: Any = exported.run_decompositions

    def run_decompositions(table: Mapping[Any, Any]) -> Any:
        return exported if is_decomposed(exported.graph, table, is_translated) else decompose(dict(table))

    vars(exported)["run_decompositions"] = run_decompositions


def is_decomposed(graph: Graph, table: Mapping[Any, Any], is_translated: Callable[[OpOverload], bool]) -> bool:
    """Whether a graph has translated operators alone, none that `table` decomposes, changes a tensor, or calls another
    graph. `aten.to` is in no table: torch takes such operators apart whenever it decomposes anything."""
    for node in graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op != "call_function" or getattr(node.target, "__module__", "") == "_operator":
            continue
        target = node.target
        if not isinstance(target, OpOverload) or target in table or target._schema.is_mutable:
            return False
        if not is_translated(target):
            return False
    return True


@contextlib.contextmanager
def _registry_read_once(opset: int) -> Iterator[Callable[[OpOverload], bool]]:
    """Each export gets a copy of the registry that was read first for its opset: it adds its own table to it.

    Yields whether it translates an operator. A version of torch without this class reads it as often as it likes, and
    decomposes each graph.
    """
    try:
        registry: Any = importlib.import_module(_REGISTRY).ONNXRegistry
        original, read = vars(registry)["from_torchlib"], registry.from_torchlib
    except (ImportError, AttributeError, KeyError):
        yield lambda operator: False
        return

    def from_torchlib(**options: Any) -> Any:
        found = copy.copy(_torchlib(read, **options))
        found.functions = {target: list(known) for target, known in found.functions.items()}
        # a trace turns reshapes into views, which are written otherwise: they are, with the trace and without it
        views = [replace(known, fx_target=aten.reshape.default) for known in found.functions["aten::view"]]
        found.functions["aten::reshape"] = views
        return found

    registry.from_torchlib = staticmethod(from_torchlib)
    try:
        yield lambda operator: bool(_torchlib(read, opset_version=opset).is_registered(operator))
    finally:
        registry.from_torchlib = original


@functools.cache
def _torchlib(read: Callable[..., Any], **options: Any) -> Any:
    return read(**options)
