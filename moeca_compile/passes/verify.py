"""Whether a pass left a graph that still says what it computes. Tests check it after every pass; users may ask for it.

FX's own lint knows nothing of values. Here: each changed node's operator, run on fake tensors, gives the shape and
dtype that the node claims; states are read and written as the layout says; the model's results are as many and of the
same kind, in the same order. Only nodes that a pass changed are run again, so that this costs little.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from moeca_compile.graph import fx
from moeca_compile.graph.autocast import autocast_is
from moeca_compile.graph.variant import StateSlot

F = TypeVar("F", bound=Callable[..., Any])

_STATE = re.compile(r"state_\d+")
_RUN_AGAIN = (operator.getitem, operator.add, operator.mul)  # beside operators of torch
_changing: set[str] = set()


def changes_outputs(function: F) -> F:
    """Marks a pass that may change which results a graph gives."""
    _changing.add(function.__name__)
    return function


class GraphState:
    """A graph before a pass; `problem_of` compares it with what the pass made of it."""

    def __init__(self, gm: GraphModule) -> None:
        self.calls = {node: (node.target, node.args, node.kwargs) for node in gm.graph.nodes}
        self.values = {node: fx.value(node) for node in gm.graph.nodes}
        self.results = results_of(gm)

    def problem_of(self, gm: GraphModule, function: Callable[..., Any], context: object) -> str:
        """What is wrong with the graph that the pass `function` left; '' if nothing is.

        Args:
            context: the pass's own; where it has a `layout`, states are held against it.
        """
        layout: Sequence[StateSlot] | None = getattr(context, "layout", None)
        problems = self._values_of(gm)
        if layout is not None:
            yield_states = state_problems(gm, layout)
            problems = _both(problems, yield_states)
        if function.__name__ not in _changing:
            problems = _both(problems, self._results_of(gm))
        return next(problems, "")

    def _values_of(self, gm: GraphModule) -> Iterator[str]:
        for node in gm.graph.nodes:
            if self._is_unchanged(node) or not _can_run(node):
                continue
            args, kwargs = map_arg((node.args, node.kwargs), fx.value)
            target: Any = node.target
            try:
                with torch.no_grad(), autocast_is(()), fx.fake_mode_of((args, kwargs)):
                    result = target(*args, **kwargs)
            except Exception as error:
                yield f"{node.name} can't be computed: {node.target} on {_kinds(args)} raises {error!r}"
                continue
            if _kinds(result) != _kinds(fx.value(node)):
                yield f"{node.name} is {_kinds(result)}, but its node says {_kinds(fx.value(node))}"

    def _is_unchanged(self, node: Node) -> bool:
        if self.calls.get(node) != (node.target, node.args, node.kwargs):
            return False
        return all(self.values.get(read) is fx.value(read) for read in (node, *node.all_input_nodes))

    def _results_of(self, gm: GraphModule) -> Iterator[str]:
        before, after = self.results, results_of(gm)
        if len(before) != len(after):
            yield f"the graph gave {len(before)} results, now it gives {len(after)}"
            return
        if before != after and set(before) == set(after):
            yield f"its results {[node.name for node in before]} come in another order: {[node.name for node in after]}"
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            was, now = _kinds(self.values[old]), _kinds(fx.value(new))
            if was != now and fx.value(new) is not None:
                yield f"result {place} was {was}, now {new.name} is {now}"


def results_of(gm: GraphModule) -> list[Node]:
    """The nodes of the model's own results: what a graph gives but for new state."""
    outputs = list(fx.nodes_of(fx.output_node(gm).args[0]))
    return outputs[: len(outputs) - len(gm.meta.get("moeca_writes", ()))]


def state_problems(gm: GraphModule, layout: Sequence[StateSlot]) -> Iterator[str]:
    """States that a graph reads or writes otherwise than the layout says."""
    slots = {slot.name: slot for slot in layout}
    for node in fx.placeholders(gm):
        if node.name in slots:
            if wrong := _unlike(node, slots[node.name]):
                yield f"{node.name}: read as {wrong}"
        elif _STATE.fullmatch(node.name):
            yield f"{node.name} is read, and the layout has no such state"
    names: tuple[str, ...] = gm.meta.get("moeca_writes", ())
    outputs = list(fx.nodes_of(fx.output_node(gm).args[0]))
    if len(outputs) < len(names):
        yield f"{len(names)} states are to be written, and the graph gives {len(outputs)} values"
        return
    changed: tuple[str, ...] = gm.meta.get("moeca_changes", ())
    if lost := [name for name in changed if name not in {node.name for node in fx.placeholders(gm)} or name in names]:
        yield f"{lost[0]} is to be changed in place, and the graph doesn't read it, or writes it too"
    if len(set(names)) < len(names):
        yield f"a state is written twice: {sorted(names)}"
    for name, node in zip(names, outputs[len(outputs) - len(names) :], strict=True):
        if name not in slots:
            yield f"{name} is written, and the layout has no such state"
        elif wrong := _unlike(node, slots[name]):
            yield f"{name}: written as {wrong}"


def _unlike(node: Node, slot: StateSlot) -> str:
    val = fx.tensor(node)
    if val is not None and tuple(val.shape) == slot.shape and str(val.dtype) == f"torch.{slot.dtype}":
        return ""
    return f"{_kinds(val)}, the layout says {slot.dtype} {list(slot.shape)}"


def _can_run(node: Node) -> bool:
    """Whether the node's value can be computed again: it and what it reads have values of known sizes."""
    can_call = isinstance(node.target, OpOverload) or node.target in _RUN_AGAIN
    nodes = (node, *node.all_input_nodes)
    return can_call and not any(fx.value(read) is None or fx.has_unknown_size(read) for read in nodes)


def _kinds(values: Any) -> str:
    """Shapes and dtypes of the tensors in `values`."""
    tensors = [tensor for tensor in tree_leaves(values) if isinstance(tensor, torch.Tensor)]
    kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    return ", ".join(kinds) or "no tensor"


def _both(first: Iterator[str], second: Iterator[str]) -> Iterator[str]:
    yield from first
    yield from second
