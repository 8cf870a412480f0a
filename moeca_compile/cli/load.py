"""What people name on the command line: `package.module:function`, beside the current folder too, and weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from moeca_compile.errors import OptionError


def load(source: str) -> Any:
    """The object that `package.module:name` names.

    Raises:
        OptionError: another form, or nothing there.
    """
    module, _, name = source.partition(":")
    if not module or not name:
        raise OptionError(f"{source!r}: expected package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{source!r} can't be loaded: {error}") from error


def call(source: str) -> Any:
    """What the function that `package.module:function` names returns.

    Raises:
        OptionError: it names no function.
    """
    function = load(source)
    if not callable(function):
        raise OptionError(f"{source!r} is no function but {type(function).__name__}")
    return function()


def model_of(source: str, weights: Path | None) -> Any:
    """The model that the function returns, in eval mode, with the weights of a file in the dtype that it has. Example
    inputs after the model, as `moeca export` wants them, are left aside.

    Raises:
        OptionError: it returns no model, or the weights don't fit.
    """
    returned = call(source)
    model = returned[0] if isinstance(returned, tuple) and returned else returned
    if not hasattr(model, "load_state_dict"):
        raise OptionError(f"{source!r} returned {type(model).__name__}; expected a model, or (model, example_inputs)")
    if weights is not None:
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(weights))
        except (OSError, RuntimeError) as error:
            raise OptionError(f"{weights} can't be loaded into {type(model).__name__}: {error}") from error
    return model.eval().requires_grad_(False)
