"""The signature that a program is made for: shapes, strides and dtypes of the arguments, and the numbers among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moeca_compile.errors import CaptureError, MoecaError, StateError
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Capture, Input, capture


def refuse_gradients(values: Iterable[Any]) -> None:
    """Refuse a call that would be recorded for gradients. Call it where grad mode is on.

    Raises:
        StateError: one of the values is a tensor that requires grad.
    """
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        raise StateError(
            "moeca is for inference: grad mode is on and some tensors require grad. Call the model under "
            "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
        )


def captured_of(gm: torch.fx.GraphModule, args: Sequence[Any], inputs: Sequence[Input]) -> Capture:
    """Capture Dynamo's graph. Dynamo runs some graphs that can't be captured, such as those with sizes that depend on
    data.

    Raises:
        CaptureError: the graph can't be captured; torch's own errors are converted.
    """
    try:
        return capture(gm, args, inputs)
    except MoecaError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(f"torch can't trace the graph once more: {type(error).__name__}: {first}") from error


def kind_of(value: Any, strides: bool = True) -> tuple[Any, ...]:
    """Shape, strides, dtype and device of a tensor; empty for any other value."""
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(value.shape), strides_of(value) if strides else (), str(value.dtype), str(value.device)


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
