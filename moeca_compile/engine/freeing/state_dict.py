"""A model without some of its weights gives no state dict, and can't be compiled, exported or saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Size
from torch.nn import Module

from moeca_compile.errors import StateError


def refuse_state_dicts(models: Iterable[Module], dropped: Mapping[int, Size]) -> None:
    """Let the modules that hold dropped weights refuse to give their state dict until they are loaded again.

    Args:
        models: with these modules.
        dropped: by id of a weight, the shape that it had.
    """
    for module in [module for model in models for module in model.modules()]:
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = {name: dropped[id(value)] for name, value in held if id(value) in dropped}
        if shapes:
            module.register_state_dict_pre_hook(partial(_refuse, list(shapes)))
            module.register_load_state_dict_pre_hook(partial(_give_room, shapes))


def _give_room(shapes: Mapping[str, Size], module: Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Give weights without values their shapes back, so that what is being loaded fits."""
    for name, shape in shapes.items():
        weight = getattr(module, name)
        if prefix + name in state_dict and not weight.numel():
            weight.data = torch.empty(shape, dtype=weight.dtype, device=weight.device)


def refuse_dropped(model: Module) -> None:
    """Refuse a model that misses weights which `free_hoisted="drop"` dropped.

    Raises:
        StateError: it does.
    """
    for path, module in model.named_modules():
        for hook in list(module._state_dict_pre_hooks.values()):
            if isinstance(hook, partial) and hook.func is _refuse:
                hook(module, f"{path}." if path else "", False)


def _refuse(names: list[str], module: Module, prefix: str, keep_vars: Any) -> None:
    """Raise if one of these weights of the module is still without values."""
    missing = [prefix + name for name in names if not getattr(module, name).numel()]
    if missing:
        raise StateError(
            f"free_hoisted='drop': {missing[0]} was dropped, so the model has no state dict, and can't be compiled, "
            "exported or saved once more. Do so before the first trajectory, load the weights again, or use "
            "free_hoisted='host'"
        )
