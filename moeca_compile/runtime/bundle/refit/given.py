"""Weights that somebody gives for a bundle: names, shapes and dtypes are checked before anything is written."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle import bfloat16
from moeca_compile.runtime.bundle.refit.parameters import ParameterSpec, ParameterTable

SHOWN = 5  # names that a message lists


class GivenWeights:
    """Arrays by the names of parameters, read one at a time.

    Args:
        weights: arrays or tensors by name, or a file in the safetensors format.
        table: of the bundle.

    Raises:
        BundleError: a name that the model doesn't have, another shape or dtype, other values for a parameter that can't
            be exchanged, two names of one parameter with different values, or an unreadable file.
    """

    def __init__(self, weights: Mapping[str, Any] | str | Path, table: ParameterTable) -> None:
        self._readers: dict[str, Callable[[], Any]] = {}
        readers = _readers(weights)
        if unknown := sorted(name for name in readers if name not in table.parameters and name not in table.aliases):
            raise BundleError(
                f"the model has no parameters {_listed(unknown)}. Give the names of its state dict, such as "
                f"{_listed(list(table.parameters))}"
            )
        fixed = list[str]()
        for name, reader in readers.items():
            first = table.aliases.get(name, name)
            array = _checked(name, reader(), table.parameters[first])
            if first in self._readers and not _equal(array, self.array(first)):
                raise BundleError(f"{name} and {first} are one parameter, and two different arrays are given for it")
            if not table.parameters[first].is_fixed:
                self._readers.setdefault(first, _reader_of(name, reader, table.parameters[first]))
            elif hashlib.sha256(array.tobytes()).hexdigest() != table.parameters[first].sha256:
                fixed.append(name)
        if fixed:
            raise BundleError(
                f"the graphs have constants that were computed with {_listed(fixed)}: export again for other values of "
                "them, or leave them out"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def array(self, name: str) -> Any:
        """The values of a parameter as a bundle stores them."""
        return self._readers[name]()


def _readers(weights: Mapping[str, Any] | str | Path) -> dict[str, Callable[[], Any]]:
    if isinstance(weights, Mapping):
        return {name: lambda value=value: value for name, value in weights.items()}  # type: ignore[misc]
    if not isinstance(weights, (str, Path)):
        raise BundleError(
            f"weights: expected arrays by name or a safetensors file, got {type(weights).__name__}; for a model give "
            "model.state_dict()"
        )
    try:
        import safetensors
    except ImportError:
        raise BundleError("reading this file needs safetensors: pip install safetensors") from None
    try:
        file: Any = safetensors.safe_open(str(weights), framework="numpy")
        names = list(file.keys())
    except Exception as error:  # safetensors' own class, and the system's
        raise BundleError(f"{str(weights)!r} is no readable safetensors file: {error}") from error
    return {name: lambda name=name: file.get_tensor(name) for name in names}  # type: ignore[misc]


def _reader_of(name: str, reader: Callable[[], Any], spec: ParameterSpec) -> Callable[[], Any]:
    return lambda: _checked(name, reader(), spec)


def _checked(name: str, value: Any, spec: ParameterSpec) -> Any:
    """The values as a bundle stores them: contiguous, bfloat16 as its bits."""
    try:
        array, dtype = _array(value)
    except Exception as error:  # whatever the object's own conversion raises
        raise BundleError(f"{name} is no array: {type(error).__name__}: {error}") from error
    if dtype != spec.dtype or array.shape != spec.shape:
        raise BundleError(
            f"{name} is {dtype} {list(array.shape)}, the bundle's is {spec.dtype} {list(spec.shape)}: give it in this "
            "shape and dtype"
        )
    return np.require(array, array.dtype.newbyteorder("="), ("C",))


def _array(value: Any) -> tuple[Any, str]:
    if hasattr(value, "detach"):  # a torch tensor, so torch is there
        tensor = value.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return (tensor.view(sys.modules["torch"].uint16) if dtype == bfloat16.NAME else tensor).numpy(), dtype
    array = np.asarray(value)
    return bfloat16.to_stored(array), array.dtype.name


def _equal(first: Any, second: Any) -> bool:
    return bool(first.tobytes() == second.tobytes())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
