"""Dynamo's trace of a dry run, or of an export: the call of a module that equals one traced before, with arguments of
the same kinds, is not traced again. Its nodes are copied, with its own weights.

A call is copied only where tracing it would give just that: it read nothing but its arguments and its own weights,
nothing that was there before the trace has changed, and what it gave are tensors and plain values. Such a trace is
discarded after its one call, so the guards that a copy lacks are never asked.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import remove_from_cache
from torch._dynamo.variables import (
    ConstantVariable,
    ConstDictVariable,
    ListVariable,
    TensorVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
)
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import SizeVariable
from torch.fx import Node, Proxy
from torch.fx.node import map_arg

from moeca_compile.frontend.reporting.equal_modules import kinds_of_modules
from moeca_compile.graph.copying import NotAlone, modes_key, plain_key, tensor_key


@dataclass(frozen=True)
class _Template:
    """A traced call.

    Attributes:
        module: whose call it was.
        path: of the module, as Dynamo names it.
        nodes: that it made.
        read: nodes of its arguments.
        weights: nodes of its weights, with their names in the module.
        gave: its result, with a `_Read` for an argument.
        calls: how often it called which of its submodules, by the path below its own.
    """

    module: nn.Module
    path: str
    nodes: Sequence[Node]
    read: Sequence[Node]
    weights: Mapping[Node, str]
    gave: Any
    calls: Mapping[str, int]


@contextmanager
def equal_calls_copied(model: nn.Module) -> Iterator[None]:
    """Copy equal calls in this thread's traces."""
    copying = _Copying(model)
    thread = threading.get_ident()
    original: Callable[..., Any] = UnspecializedNNModuleVariable.call_function

    def call_function(variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(variable, tx, args, kwargs)
        return copying.call(original, variable, tx, args, kwargs)

    traced: list[CodeType] = []
    UnspecializedNNModuleVariable.call_function = call_function  # type: ignore[method-assign, assignment]
    try:
        with register_bytecode_hook(lambda code, _: traced.append(code)):
            yield
    finally:
        UnspecializedNNModuleVariable.call_function = original  # type: ignore[method-assign]
        if copying.copies:
            for code in traced:
                remove_from_cache(code)


class _Copying:
    """The calls of one model. `copies`: how many were copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.copies = model, 0
        self.kinds: Mapping[nn.Module, Hashable] = {}
        self._templates: dict[Hashable, _Template | None] = {}  # None: traced each time
        self._output: Any = None

    def call(self, original: Callable[..., Any], variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self._output is not tx.output:  # another trace: the model may have been prepared in between
            self._output, self._templates, self.kinds = tx.output, {}, kinds_of_modules(self.model)
        if variable.value not in self.kinds:
            return original(variable, tx, args, kwargs)
        taken = _Taken()
        try:
            key = (self.kinds[variable.value], taken.kinds(args, kwargs), _state(variable, tx))
        except NotAlone:
            return original(variable, tx, args, kwargs)
        template = self._templates.get(key)
        if template is not None and template.path != _path(variable):
            copied = _copied(template, taken, variable, tx)
            if copied is not None:
                self.copies += 1
                return copied
        last, calls = tx.output.graph._root.prev, dict(tx.num_calls)
        path = _path(variable)  # a bound function that is called inside gives the variable another one
        result = original(variable, tx, args, kwargs)
        if key not in self._templates:
            try:
                again = _Taken()
                if (again.kinds(args, kwargs), again.nodes) != (key[1], taken.nodes) or _state(variable, tx) != key[2]:
                    raise NotAlone
                self._templates[key] = _template(variable.value, path, tx, taken, last, calls, result)
            except NotAlone:
                self._templates[key] = None
        return result


class _Taken:
    """The tensors among a call's arguments, as nodes and as Dynamo's variables."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.variables: list[Any] = []

    def kinds(self, args: Any, kwargs: Any) -> Hashable:
        return tuple(map(self.kind, args)), tuple((name, self.kind(value)) for name, value in kwargs.items())

    def kind(self, variable: Any) -> Hashable:
        is_lazy = isinstance(variable, LazyVariableTracker) and not variable.is_realized()
        if is_lazy and isinstance(variable.peek_value(), torch.Tensor):
            raise NotAlone  # it would become an input before the weights that are read first
        variable = variable.realize()
        kind = type(variable)
        if kind is ConstantVariable:
            return kind, *plain_key(variable.as_python_constant())
        if kind in (TupleVariable, ListVariable, SizeVariable):
            return kind, *map(self.kind, variable.items)
        if kind is ConstDictVariable:
            return kind, *((self.kind(key.vt), self.kind(value)) for key, value in variable.items.items())
        if kind is not TensorVariable:
            raise NotAlone
        node = variable.as_proxy().node
        value = node.meta["example_value"]
        self.nodes.append(node)
        self.variables.append(variable)
        return kind, variable.class_type, tensor_key(value), self.nodes.index(node)


def _state(variable: Any, tx: Any) -> Hashable:
    """What else decides how a call is traced: modes, and from where it is called (for the notes of its nodes)."""
    effects, output = tx.output.side_effects, tx.output
    if effects.mutated_sources or effects.tensor_hooks or effects.save_for_backward or not variable.source:
        raise NotAlone  # something that was there before the trace has changed
    if output.current_tracer is not output.root_tracer:
        raise NotAlone
    places = []
    frame = tx
    while frame is not None:
        places.append((frame.f_code, frame.instruction_pointer))
        frame = getattr(frame, "parent", None)
    return modes_key(), tuple(places), len(output.random_calls), len(output.torch_function_mode_stack)


def _path(variable: Any) -> str:
    """As `record_nn_module_stack` of torch names it."""
    path = variable.get_nn_module_stack_source().name
    return re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", path)


def _template(
    module: nn.Module, path: str, tx: Any, taken: _Taken, last: Node, calls: Mapping[str, int], result: Any
) -> _Template:  # fmt: skip
    made = []
    while (last := last.next).op != "root":
        made.append(last)
    own = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    inside, weights = {*made, *taken.nodes}, dict[Node, str]()
    for node in made:
        if node.op not in ("call_function", "call_method"):
            raise NotAlone
        _static(node.meta.get("example_value"))
        for source in node.all_input_nodes:
            if source not in inside and source not in weights:
                argument = source.meta.get("grapharg")
                name = None if argument is None or source.op != "placeholder" else own.get(id(argument.example))
                if name is None:
                    raise NotAlone
                weights[source] = name
    called = {name: n for name, n in tx.num_calls.items() if calls.get(name, 0) != n}
    if not made or any(name in calls or not name.startswith(path) for name in called):
        raise NotAlone
    gave = _given(result, {*made}, taken)
    order = {node: name for node in tx.output.graph.nodes if (name := weights.get(node)) is not None}
    return _Template(module, path, made, taken.nodes, order, gave, {n[len(path) :]: k for n, k in called.items()})


def _static(value: Any) -> None:
    for each in torch.utils._pytree.tree_leaves(value):
        if isinstance(each, torch.Tensor):
            tensor_key(each)
        else:
            plain_key(each)


@dataclass(frozen=True)
class _Read:
    number: int


def _given(result: Any, made: set[Node], taken: _Taken) -> Any:
    result = result.realize()
    if type(result) is TupleVariable:
        return tuple(_given(each, made, taken) for each in result.items)
    if type(result) is ConstantVariable:
        plain_key(result.as_python_constant())
        return result
    if type(result) is not TensorVariable:
        raise NotAlone
    node = result.as_proxy().node
    if any(result is each for each in taken.variables):
        return _Read(next(i for i, each in enumerate(taken.variables) if each is result))
    if node not in made:
        raise NotAlone
    return result


def _copied(template: _Template, taken: _Taken, variable: Any, tx: Any) -> Any:
    """The result of a call, its nodes copied; None: it can't be copied."""
    path, graph, tracer = _path(variable), tx.output.graph, tx.output.current_tracer
    if any(node._erased for node in template.nodes) or any(path + below in tx.num_calls for below in template.calls):
        return None
    copies = dict(zip(template.read, taken.nodes, strict=True))
    for node, name in template.weights.items():
        copies[node] = _weight(variable, tx, name).as_proxy().node
    ids = {str(id(old)): str(id(new)) for old, new in _pairs(template.module, variable.value)}
    for node in template.nodes:
        args, keywords = map_arg((node.args, node.kwargs), copies.__getitem__)
        copy = graph.create_node(node.op, node.target, args, keywords, node.name, node.type)
        copy.meta = _notes(node, copy, template.path, path, ids, tx)
        copies[node] = copy
    tx.num_calls.update({path + below: count for below, count in template.calls.items()})

    def given(gave: Any) -> Any:
        if isinstance(gave, _Read):
            return taken.variables[gave.number]
        if isinstance(gave, tuple):
            return TupleVariable([given(each) for each in gave])
        if type(gave) is ConstantVariable:
            return gave
        node = copies[gave.as_proxy().node]
        with tx.fake_mode:
            node.meta["example_value"] = node.meta["example_value"].detach()
        variable = gave.clone(proxy=Proxy(node, tracer))
        tracer.record_proxyable_vt(variable)
        return variable

    return given(template.gave)


def _weight(variable: Any, tx: Any, name: str) -> Any:
    for part in name.split("."):
        variable = variable.var_getattr(tx, part).realize()
    return variable


def _pairs(old: nn.Module, new: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    return zip(old.modules(), new.modules(), strict=True)


def _notes(node: Node, copy: Node, before: str, now: str, ids: Mapping[str, str], tx: Any) -> dict[str, Any]:
    """The notes of a node, for another module."""
    notes = dict(node.meta)
    stack = dict(tx.nn_module_stack)
    for key, (path, cls) in node.meta.get("nn_module_stack", {}).items():
        number, at, count = key.partition("@")
        if number in ids and path.startswith(before):
            stack[ids[number] + at + count] = now + path[len(before) :], cls
    if stack:
        notes["nn_module_stack"] = stack
    if "source_fn_stack" in notes:
        *outer, (name, target) = notes["source_fn_stack"]
        notes["source_fn_stack"] = [*outer, (copy.name if name == node.name else name, target)]
    return notes
