"""What people name on the command line: MODULE:FUNCTION, beside the current folder too, and weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from moeca_compile.cli.named import here_first, parts_of
from moeca_compile.errors import OptionError


def load(source: str) -> Any:
    """The object that `MODULE:FUNCTION` names.

    Raises:
        OptionError: another form, or nothing there.
    """
    module, name = parts_of(source)
    here_first()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise  # the module is right, the machine isn't
        raise OptionError(f"{source!r} can't be loaded: {error}") from error


def call(source: str) -> Any:
    """What the function that `MODULE:FUNCTION` names returns.

    Raises:
        OptionError: it names no function.
    """
    function = load(source)
    if not callable(function):
        raise OptionError(f"{source!r} is no function but {type(function).__name__}")
    return function()


def model_and_inputs(source: str, otherwise: str = "") -> tuple[Any, ...]:
    """The model and its example inputs, of one size or several.

    Args:
        source: `MODULE:FUNCTION`.
        otherwise: for the message: what does without inputs.

    Raises:
        OptionError: the function returns something else.
    """
    returned = call(source)
    if not isinstance(returned, tuple) or len(returned) < 2:
        name = type(returned).__name__
        raise OptionError(
            f"{source}: expected a function that returns (model, example_inputs), and it returned {name}{otherwise}"
        )
    return returned


def model_of(source: str, weights: Path | None) -> Any:
    """The model that the function returns, in eval mode, with the weights of a file in the dtype that it has; or a
    pipeline, as it is. Example inputs after the model are left aside.

    Raises:
        OptionError: it returns no model, or the weights don't fit.
    """
    from moeca_compile.frontend import denoisers

    returned = call(source)
    model = returned[0] if isinstance(returned, tuple) and returned else returned
    if weights is None and denoisers.parts_of(model):
        return model
    if not hasattr(model, "load_state_dict"):
        raise OptionError(f"{source!r} returned {type(model).__name__}; expected a model, or (model, example_inputs)")
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(weights))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OptionError(f"{weights} can't be loaded into {type(model).__name__}: {error}") from error
    return model.eval().requires_grad_(False)
