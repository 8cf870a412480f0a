"""Which modules of a model are equal: their forward, called with equal arguments, does the same.

Equal are: class, plain attributes, submodules, the kinds of parameters and buffers and which of them are one. A
function that was bound to the module is an attribute, too, and equal where it is the same one. A module with a hook,
weights that others use too, or an attribute that isn't plain data equals no other.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_PLAIN = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (tuple, list, set, frozenset)
_NOTED = {"_dynamo_static_input_type"}  # by Dynamo, on what it has met
_NESTED = 8


def kinds_of_modules(model: nn.Module) -> dict[nn.Module, Hashable]:
    """For each module that has submodules and equals another one: what equal ones have in common."""
    uses = Counter(
        id(tensor) for module in model.modules() for tensor in _tensors(module).values() if tensor is not None
    )
    kinds: dict[nn.Module, Hashable] = {}
    numbers: dict[Hashable, int] = {}

    def kind(module: nn.Module) -> Hashable:
        if module not in kinds:
            found = _kind(module, uses, kind)
            kinds[module] = numbers.setdefault(found, len(numbers))
        return kinds[module]

    repeated = Counter(kind(module) for module in model.modules())
    return {module: kinds[module] for module in model.modules() if repeated[kinds[module]] > 1 and module._modules}


def _kind(module: nn.Module, uses: Counter[int], kind: Any) -> Hashable:
    alone = ("alone", id(module))
    own = vars(module)
    if not own.keys() >= _OWN or any(value for name, value in own.items() if "hook" in name):
        return alone
    if own.get("_compiled_call_impl") is not None or any(uses[id(t)] > 1 for t in _tensors(module).values()):
        return alone
    try:
        attributes = tuple(
            (name, _data(_unbound(value, module))) for name, value in sorted(own.items()) if name not in _OWN
        )
        tensors = tuple((name, _described(tensor)) for name, tensor in _tensors(module).items())
    except _NotPlain:
        return alone
    below = tuple((name, None if child is None else kind(child)) for name, child in module._modules.items())
    return type(module), attributes, tensors, below, frozenset(module._non_persistent_buffers_set)


def _unbound(value: Any, module: nn.Module) -> Any:
    """Of a method of the module itself its function."""
    return value.__func__ if isinstance(value, types.MethodType) and value.__self__ is module else value


def _tensors(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {**module._parameters, **module._buffers}


def _described(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    if type(tensor) not in (torch.Tensor, nn.Parameter) or vars(tensor).keys() - _NOTED:
        raise _NotPlain
    if tensor.layout is not torch.strided:
        raise _NotPlain
    size = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return type(tensor), size, tensor.dtype, tensor.device, tensor.requires_grad


class _NotPlain(Exception):
    """An attribute that isn't plain data: what it does is unknown."""


def _data(value: Any, depth: int = 0) -> Hashable:
    """What is equal for equal data alone, and for functions and classes that are one."""
    kind = type(value)
    if depth > _NESTED or isinstance(value, nn.Module):
        raise _NotPlain
    if kind in _PLAIN:
        return kind, value
    if kind is float:
        return kind, repr(value)
    if kind in _CONTAINERS:
        items: Iterable[Any] = sorted(value, key=repr) if kind in (set, frozenset) else value
        return kind, *(_data(each, depth + 1) for each in items)
    if isinstance(value, dict):
        pairs = tuple((_data(key, depth + 1), _data(each, depth + 1)) for key, each in value.items())
        return (kind, pairs) if kind.__module__ in ("builtins", "collections") else (kind, pairs, _fields(value, depth))
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return "one", id(value)
    if isinstance(value, types.FunctionType):
        if value.__closure__:
            raise _NotPlain
        return "one", id(value)
    if type(value).__module__.startswith("torch"):
        raise _NotPlain
    return kind, _fields(value, depth)


def _fields(value: Any, depth: int) -> Hashable:
    """An object that holds data and nothing else."""
    slots = itertools.chain.from_iterable(getattr(base, "__slots__", ()) for base in type(value).__mro__)
    if not hasattr(value, "__dict__") or any(slots):
        raise _NotPlain
    return tuple((name, _data(each, depth + 1)) for name, each in sorted(vars(value).items()))
