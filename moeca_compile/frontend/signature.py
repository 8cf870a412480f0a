"""The signature that a program is made for: shapes, strides and dtypes of the arguments, and the numbers among them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeca_compile.engine.program import Program
from moeca_compile.errors import CaptureError, MoecaError
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, Input, capture
from moeca_compile.runtime.warned import Warned


def captured_of(gm: torch.fx.GraphModule, args: Sequence[Any], inputs: Sequence[Input]) -> Capture:
    """Capture Dynamo's graph. Dynamo runs some graphs that can't be captured, such as those with sizes that depend on
    data.

    Raises:
        CaptureError: the graph can't be captured; torch's own errors are converted.
    """
    try:
        return capture(gm, args, inputs, with_caches=True)
    except MoecaError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(f"torch can't trace the graph once more: {type(error).__name__}: {first}") from error


def with_caches_as_arguments(inputs: Sequence[Input], captured: Capture) -> tuple[Input, ...]:
    """The inputs of a graph, with buffers that the model overwrites as arguments of the call: when their values change,
    the model is no other."""
    written = {source.label for source in captured.inputs if not source.is_weight}
    return tuple(replace(one, is_weight=one.is_weight and one.label not in written) for one in inputs)


def kind_of(value: Any, strides: bool = True) -> tuple[Any, ...]:
    """Shape, strides, dtype and device of a tensor; empty for any other value."""
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(value.shape), strides_of(value) if strides else (), str(value.dtype), str(value.device)


def labelled_kinds(
    inputs: Sequence[Input], args: Sequence[Any], numbers: Mapping[int, Any], skip: Container[int] = (),
    strides: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """The kind of each argument with its label and number, in the order of the labels.

    Args:
        inputs: of a graph.
        args: of a call of it.
        numbers: Python numbers among them, by position.
        skip: positions to leave out.
        strides: strides of tensors that aren't weights count too.
    """
    kinds = []
    for i, source in enumerate(inputs):
        if i not in skip:
            kinds.append((source.label, repr(numbers.get(i)), kind_of(args[i], strides or source.is_weight)))
    return tuple(sorted(kinds))


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor, with 0 for each axis of at most one element, whose stride has no meaning."""
    strides = tensor.stride()
    if 1 not in tensor.shape:
        return strides
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, strides, strict=True))


def floats_of(gm: torch.fx.GraphModule) -> frozenset[int]:
    """Positions of Python floats that Dynamo (with dynamic=True, or after a change) passes as 0-d tensors."""
    arguments = [node.meta.get("grapharg") for node in fx.placeholders(gm)]
    return frozenset(i for i, argument in enumerate(arguments) if getattr(argument, "pass_arg_as_tensor", False))


def with_floats(gm: torch.fx.GraphModule, values: Mapping[int, float]) -> torch.fx.GraphModule:
    """A copy of the graph with these floats as constants, so that no tensor's value decides what is traced.

    Args:
        gm: Dynamo's graph.
        values: by position among the arguments.
    """
    if not values:
        return gm
    placeholders = fx.placeholders(gm)
    constants = {placeholders[i]: value for i, value in values.items()}
    graph, copies = torch.fx.Graph(), dict[torch.fx.Node, Any]()
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in constants:
            copies[node] = constants[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    return torch.fx.GraphModule(gm, graph)


def warn_of_numbers(
    key: tuple[Any, ...], earlier: Sequence[tuple[Any, ...]], labels: Sequence[str], warned: Warned
) -> None:
    """Warn of a number that changes from call to call, at its third value: two may be a changed setting.

    Args:
        key: of a call; its second entry are the call's numbers.
        earlier: keys of earlier calls of the graph.
        labels: one for each number.
        warned: counts the warnings.
    """
    values = [other[1] for other in earlier if other[2:] == key[2:]]
    if len(values) == 2:
        values.append(key[1])
        changing = [label for n, label in enumerate(labels) if len({value[n] for value in values}) == 3]
        warned.once(
            f"{', '.join(changing) or 'an input'} comes as a Python number that changes from call to call, and a "
            "graph is captured and compiled for each value. Pass it as a tensor",
            "numbers",
        )


def warn_of_shapes(captured: Capture, earlier: Iterable[Program], warned: Warned) -> None:
    """Warn where a graph has the weights of an earlier one in other shapes, as an adapter of another rank makes it.

    Args:
        captured: the new graph.
        earlier: the programs of the handle.
        warned: counts the warnings.
    """
    shapes = _weight_shapes(captured.gm, captured.inputs)
    for program in earlier:
        before = _weight_shapes(program.analysis.gm, program.analysis.facts.inputs)
        changed = [label for label, shape in shapes.items() if before.get(label, shape) != shape]
        if changed and before.keys() == shapes.keys():
            label = changed[0]
            warned.once(
                f"{len(changed)} weights have other shapes than before ({label}: {list(before[label])}, now "
                f"{list(shapes[label])}), so the model was captured and compiled again. Adapters of several ranks "
                "share one graph if they are padded to one rank before compiling, as "
                "peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=...) does",
                "weights of other shapes",
            )


def _weight_shapes(gm: torch.fx.GraphModule, inputs: Sequence[Input]) -> dict[str, tuple[int, ...]]:
    pairs = zip(fx.placeholders(gm), inputs, strict=True)
    return {entry.label: fx.shape(node) for node, entry in pairs if entry.is_weight}
