"""The conversions that autocast makes in the dispatcher become nodes, and its regions inside the model go.

Before: a captured graph; the autocasts that were on are in `facts.autocast`, regions of the model's own are calls of
`_enter_autocast` and `_exit_autocast`.  After: the same values, bit for bit, with autocast off.
Does nothing where no autocast was on, outside the model or in it.

Which operator converts which argument is asked of the dispatcher itself, operator by operator, on fake tensors: there
is no list of operators to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moeca_compile.errors import CaptureError
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import Casts, autocast_is
from moeca_compile.graph.capture import refuse_data_dependence
from moeca_compile.passes.facts import Facts

Conversions = dict[int, torch.dtype]  # by id of a fake value


def materialize_casts(gm: GraphModule, facts: Facts) -> GraphModule:
    if not facts.autocast and not any(node.target is _enter_autocast for node in gm.graph.nodes):
        return gm
    dtypes = dict(facts.autocast)  # of the autocasts that are on at the node
    outside: dict[Node, dict[str, torch.dtype]] = {}  # of each region in which the node is: what was on around it
    with torch.inference_mode(False), torch.no_grad(), autocast_is(()), refuse_data_dependence():
        for node in list(gm.graph.nodes):
            if node.target is _enter_autocast:
                outside[node] = dict(dtypes)
                device, dtype, enabled, *_ = node.args
                if enabled:
                    dtypes[device] = dtype or dtypes.get(device) or torch.get_autocast_dtype(device)
                else:
                    dtypes.pop(device, None)
            elif node.target is _exit_autocast:
                dtypes = outside.pop(node.args[0])
            elif node.op == "call_function":
                if dtypes and isinstance(node.target, OpOverload):
                    _cast_inputs(gm, node, tuple(dtypes.items()))
                fx.refresh(node)
    for node in reversed(gm.graph.nodes):
        if node.target in (_enter_autocast, _exit_autocast):
            gm.graph.erase_node(node)
    return gm


def _cast_inputs(gm: GraphModule, node: Node, casts: Casts) -> None:
    conversions = _casts_of(node, casts)
    for source in node.all_input_nodes:
        dtype = conversions.get(id(fx.value(source)))
        if dtype is not None:
            with gm.graph.inserting_before(node):
                cast = fx.call(gm, torch.ops.aten._to_copy.default, (source,), {"dtype": dtype}, like=node)
            fx.copy_noted_shape(source, cast)
            node.replace_input_with(source, cast)


class _Watch(TorchDispatchMode):
    """Notes the first dtype that each of some tensors is converted to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conversions: Conversions = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "dtype" in kwargs:
            self.conversions.setdefault(id(args[0]), kwargs["dtype"])
        return func(*args, **kwargs)


def _casts_of(node: Node, casts: Casts) -> Conversions:
    """Which of `node`'s arguments these autocasts convert before the operator, and to what.

    The dispatcher is watched; but an operator's own code converts too (SDPA and rms_norm compute in float32), and a
    composite operator (einsum) is converted inside. So a reading counts only if the operator, without autocast, gives
    the dtypes that it gave with it.

    Raises:
        CaptureError: no reading does.
    """
    if node.target is torch.ops.aten._to_copy.default:
        return {}
    expected = _dtypes(fx.value(node))
    readings: tuple[Callable[[Node, Casts], Conversions], ...] = (_watched, lambda *_: {}, _casts_of_linears)
    for read in readings:
        conversions = read(node, casts)
        if _result_dtypes(node, conversions) == expected:
            return conversions
    raise CaptureError(
        f"{node.name} ({node.target}, {fx.where(node)}): what autocast converts inside it can't be told. Put it under "
        "`with torch.autocast(device_type, enabled=False)`, or convert the model and leave autocast off"
    )


def _watched(node: Node, casts: Casts) -> Conversions:
    args, kwargs = _arguments(node)
    with fx.fake_mode_of((args, kwargs)), autocast_is(casts), _Watch() as watch:
        node.target(*args, **kwargs)  # type: ignore[operator]
    conversions: Conversions = watch.conversions
    return conversions


def _casts_of_linears(node: Node, casts: Casts) -> Conversions:
    values = [value for value in map(fx.tensor, node.all_input_nodes) if value is not None]
    dtype = dict(casts).get(values[0].device.type) if values else None
    wide = (dtype, torch.float64)  # autocast never touches float64
    return {id(v): dtype for v in values if dtype is not None and v.is_floating_point() and v.dtype not in wide}


def _result_dtypes(node: Node, conversions: Conversions) -> list[torch.dtype] | None:
    """What the op gives with these conversions made; None where it refuses."""

    def converted(source: Node) -> Any:
        value = fx.value(source)
        return value.to(conversions[id(value)]) if id(value) in conversions else value

    tree = (node.args, node.kwargs)
    with fx.fake_mode_of(tree_map_only(Node, fx.value, tree)):
        args, kwargs = tree_map_only(Node, converted, tree)
        try:
            return _dtypes(node.target(*args, **kwargs))  # type: ignore[operator]
        except RuntimeError:  # dtypes that don't go together
            return None


def _dtypes(value: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _arguments(node: Node) -> Any:
    return tree_map_only(Node, fx.value, (node.args, node.kwargs))
