"""Inductor's code calls the operators of kept branches as the Python functions that they are.

By itself it calls `torch.ops.moeca...`: torch's dispatcher takes the arguments apart in C++, finds the CPU's function
and puts them together again in Python. There is nothing to dispatch in code that is compiled for a CPU, and a step has
two such calls a layer: on the narrow digits models they take a twentieth of a row with few computed branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeca_compile.ops import branches, top_k

# Code in Inductor's cache outlives a release: these names stay.
_NAMES = {
    **{f"torch.ops.moeca.{name}": f"moeca_branches.KERNELS[{name!r}]" for name in branches.KERNELS},
    "torch.ops.moeca.top_k.default": "moeca_top_k.top_k",
}
_IMPORTS = (
    f"import {branches.__name__} as moeca_branches",
    f"import {top_k.__name__} as moeca_top_k",
)


def call_directly() -> None:
    """Say so to Inductor. A torch without its registry of such code goes through the dispatcher."""
    try:
        from torch._inductor.codegen import custom_extern_kernel_codegen as registry
    except ImportError:
        return
    for operator, function in _NAMES.items():
        registry.CUSTOM_EXTERN_KERNEL_CODEGEN.setdefault(operator, registry.CustomCodegen(python=_call(function)))


def _call(function: str) -> Callable[[Any, Callable[[str], None]], None]:
    def write(node: Any, writeline: Callable[[str], None]) -> None:
        from torch._inductor.virtualized import V

        for line in _IMPORTS:
            V.graph.wrapper_code.add_import_once(line)
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        writeline(f"{node.get_name()} = {function}({arguments})")

    return write
