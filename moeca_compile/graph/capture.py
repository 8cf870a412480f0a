"""Dynamo's graph -> one functional ATen graph: the IR that every pass reads, whichever door it came through.

SDPA and linear stay whole, views and in-place ops are functionalised, weights are placeholders, module paths and
source lines are kept. One capture is for one concrete input signature: sizes are numbers in it.
"""

from __future__ import annotations

import gc
import inspect
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._pytree import tree_map_only

from moeca_compile.errors import CaptureError
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import Casts, ambient_autocast, autocast_is
from moeca_compile.graph.blocks import repeated_blocks
from moeca_compile.graph.caches import is_overwritten
from moeca_compile.graph.constants import Number, constants_of
from moeca_compile.graph.copying import Copying, WrittenInPlace
from moeca_compile.graph.eager import Eager

# Operators of other packages that torch keeps whole, such as torchao's dequantization: nothing that a user can change.
_WHOLE_OPERATORS = "At pre-dispatch tracing, we assume that any custom op marked with CompositeImplicitAutograd"
_RESERVED = re.compile(r"coefficients|now|(state|hoisted)_\d+")  # what variants call their own inputs

# Inside a session other threads may go on calling what is compiled (before torch 2.13 they are refused).
_session = getattr(torch.compiler, "_compile_session_context", nullcontext)


def isolate_recompiles_kwargs() -> dict[str, Any]:
    """For torch.compile, from 2.13 on: else Dynamo counts what the same model was compiled with before, and past its
    limit runs eager."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


@contextmanager
def under_compile_lock() -> Iterator[None]:
    """For tracing and compiling, which use globals of torch: Dynamo's own lock keeps them apart from other threads'."""
    with compile_lock, _session(), no_collector():
        yield


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's collector pauses: it would go through all that was built so far again and again, and find nothing."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True, slots=True)
class Input:
    """One placeholder: `label` is the parameter's dotted name or the argument's name."""

    name: str
    label: str
    is_weight: bool


@dataclass(frozen=True)
class Capture:
    """A functional graph, what its placeholders are, in order, and the autocasts under which it was traced.

    The graph holds no casts of theirs until the pass `materialize_casts` has run. `caches` are the names of the inputs
    that the model overwrites in place; their new values are the graph's last results. `began` is when the capture began
    (`time.perf_counter`).
    """

    gm: GraphModule
    inputs: tuple[Input, ...]
    autocast: Casts = ()
    caches: tuple[str, ...] = ()
    began: float = 0.0

    def __str__(self) -> str:
        return str(self.gm.code)


def inputs_of(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[Input, ...]:
    """What each placeholder of a Dynamo graph is. Parameters and buffers arrive as the real tensors."""
    inputs = []
    for node, example in zip(fx.placeholders(gm), example_inputs, strict=True):
        source = getattr(node, "_dynamo_source", None)
        name = str(getattr(source, "name", "") or node.name)
        is_weight = (
            isinstance(example, torch.nn.Parameter)
            or hasattr(example, "_dynamo_static_input_type")
            or re.search(r"\._(parameters|buffers)\b", name) is not None
        )
        inputs.append(Input(node.name, fx.dotted(name) or node.name, is_weight))
    return tuple(inputs)


def capture(gm: GraphModule, args: Sequence[Any], inputs: Sequence[Input], with_caches: bool = False) -> Capture:
    """Trace `gm` for the shapes, dtypes and devices of `args`, under the ambient autocast.

    Args:
        gm: Dynamo's graph.
        args: of a call.
        inputs: of the graph.
        with_caches: inputs and buffers may be overwritten in place as a cache of keys and values is.

    Raises:
        CaptureError: the graph changes one of its inputs or buffers (the cache could not keep that), or its shapes
            or branches depend on the values in a tensor.
    """
    began, constants, casts = time.perf_counter(), constants_of(gm, args), ambient_autocast()
    try:
        graph, mutated = _traced(gm, args, constants, casts, Copying(repeated_blocks(gm, constants)), with_caches)
    except WrittenInPlace:
        graph, mutated = _traced(gm, args, constants, casts, Copying({}), with_caches)
    changed = [inputs[i].label for i in mutated]
    if with_caches:
        caches = [fx.placeholders(graph)[i] for i in mutated]
        results = list(fx.nodes_of(fx.output_node(graph).args[0]))
        values = results[len(results) - len(mutated) :]
        overwritten = [is_overwritten(cache, value) for cache, value in zip(caches, values, strict=True)]
        changed = [label for label, is_cache in zip(changed, overwritten, strict=True) if not is_cache]
    if changed:
        raise CaptureError(
            f"the model changes {', '.join(sorted(set(changed)))} in place while it runs. A cached step would skip "
            "that change: make it an input or an output of the model, or leave it out of inference. (A cache of keys "
            "and values may be overwritten in place, if what is written isn't computed from it.)"
        )
    _note_sizes(graph, args, casts)
    arguments = [replace(entry, is_weight=entry.is_weight and i not in mutated) for i, entry in enumerate(inputs)]
    renamed = _rename(graph, arguments)
    return Capture(graph, renamed, casts, tuple(renamed[i].name for i in mutated), began)


def _traced(
    gm: GraphModule, args: Sequence[Any], constants: Mapping[Node, Number], casts: Casts, copying: Copying,
    with_caches: bool,
) -> tuple[GraphModule, list[int]]:  # fmt: skip
    """The functional graph, and which inputs are changed in place; with `with_caches`, their new values are its last
    results."""
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    mutated: list[int] = []

    def functional(*fakes: Any) -> Any:
        below = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(below), FunctionalTensorMode(pre_dispatch=True, export=True):
            wrapped = tree_map_only(torch.Tensor, FunctionalTensor.to_functional, fakes)
            result = Eager(gm, constants, copying).run(*wrapped)
            copying.check()
            for i, tensor in enumerate(wrapped):
                if isinstance(tensor, FunctionalTensor):
                    _sync(tensor)
                    if torch._functionalize_has_data_mutation(tensor.elem):  # type: ignore[attr-defined]
                        mutated.append(i)
            if mutated and with_caches:
                result = (*result, *(wrapped[i] for i in mutated))
            return tree_map_only(FunctionalTensor, _plain, result)

    with (
        torch.inference_mode(False), torch.no_grad(), refuse_data_dependence(), autocast_is(casts),
        tracing(TracingContext(fake)), fx_traceback.preserve_node_meta(), _use_lazy_graph_module(True), fake,
    ):  # fmt: skip
        fakes = [fake.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a for a in args]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _WHOLE_OPERATORS)
            graph = make_fx(functional, pre_dispatch=True)(*fakes)
    return graph, mutated


@contextmanager
def refuse_data_dependence() -> Iterator[None]:
    """Turn torch's errors of what depends on the values in a tensor into one that says what to do.

    Raises:
        CaptureError: a shape or a branch depends on data.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        what = getattr(error, "func", None) or str(error).partition("\n")[0]
        raise CaptureError(
            f"the model decides by a number that it reads out of a tensor ({what}), so its graph depends on data. "
            "Pass numbers such as the timestep as tensors; for an expert dispatch that loops over counts see "
            "moeca_compile.prepare(model)"
        ) from error


def _note_sizes(graph: GraphModule, args: Sequence[Any], casts: Casts) -> None:
    """Where sizes depend on data (experts that take as many tokens as a threshold says), note this call's."""
    unknown = [node for node in graph.graph.nodes if fx.has_unknown_size(node)]
    if unknown:
        run = Interpreter(graph, garbage_collect_values=False)
        with torch.inference_mode(False), torch.no_grad(), autocast_is(casts):
            run.run(*args)
        for node in unknown:
            node.meta[fx.NOTED_SHAPE] = tuple(run.env[node].shape)


def _sync(tensor: FunctionalTensor) -> None:
    torch._sync(tensor)  # type: ignore[attr-defined, no-untyped-call]


def _plain(tensor: FunctionalTensor) -> torch.Tensor:
    _sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _rename(graph: GraphModule, inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Name the placeholders after what they are, so that a printed graph can be read."""
    renamed = []
    for node, entry in zip(fx.placeholders(graph), inputs, strict=True):
        name = re.sub(r"\W+", "_", entry.label).strip("_") or "input"
        node._rename(f"{name}_input" if _RESERVED.fullmatch(name) else name)
        node.target = node.name
        renamed.append(Input(node.name, entry.label, entry.is_weight))
    graph.recompile()
    return tuple(renamed)
