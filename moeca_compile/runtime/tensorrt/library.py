"""Classic TensorRT or TensorRT-RTX, whichever is installed: one interface under two names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from moeca_compile.errors import BundleError

# what each is imported as; the RTX bindings come without the package that would give them the shorter name
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


@dataclass(frozen=True, slots=True)
class Library:
    """`name`: a key of `MODULES`; `api`: the module."""

    name: str
    version: str
    api: Any

    @property
    def tag(self) -> str:
        """For names of directories: trt11.4.0.106, rtx1.7.1.116."""
        return f"{'rtx' if self.name == 'tensorrt-rtx' else 'trt'}{self.version}"

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.name == 'tensorrt-rtx' else 'TensorRT'} {self.version}"


def find(*names: str) -> Library:
    """The first of these libraries that there is; without names, classic TensorRT before TensorRT-RTX.

    Raises:
        BundleError: none is installed, or can be loaded.
    """
    reasons = []
    for name in names or tuple(MODULES):
        for module in MODULES[name]:
            try:
                api = importlib.import_module(module)
            except (ImportError, OSError) as error:  # OSError: of a shared library
                reasons.append(f"{module}: {error}")
            else:
                return Library(name, api.__version__, api)
    asked = names or tuple(MODULES)
    raise BundleError(
        f"this needs {' or '.join(asked)}: pip install 'moeca-compile[{asked[0]}]' ({'; '.join(reasons)})"
    )


def logger(api: Any, errors: list[str]) -> Any:
    """A logger of `api` that collects what goes wrong, latest last."""

    class Log(api.ILogger):  # type: ignore[misc] # known at run time only
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                errors.append(message.strip())

    return Log()
