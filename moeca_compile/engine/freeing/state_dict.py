"""A model without some of its weights gives no state dict."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from torch.nn import Module

from moeca_compile.errors import StateError


def refuse_state_dicts(models: Iterable[Module], dropped: Collection[int]) -> None:
    """Let the modules that hold dropped weights, by id, refuse to give their state dict until they are loaded again."""
    for module in [module for model in models for module in model.modules()]:
        names = [name for name, value in module.named_parameters(recurse=False) if id(value) in dropped]
        names += [name for name, value in module.named_buffers(recurse=False) if id(value) in dropped]
        if names:
            module.register_state_dict_pre_hook(partial(_refuse, names))


def _refuse(names: list[str], module: Module, prefix: str, keep_vars: Any) -> None:
    """Raise if one of these weights of the module is still without values."""
    missing = [prefix + name for name in names if not getattr(module, name).numel()]
    if missing:
        raise StateError(
            f"free_hoisted='drop': {missing[0]} was dropped, so the model has no state dict. Take it before the first "
            "trajectory, load the weights again (with assign=True), or use free_hoisted='host'"
        )
