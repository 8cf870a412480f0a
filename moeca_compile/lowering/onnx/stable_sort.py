"""A stable sort in ONNX: `TopK` of all values, which puts the lower index first among equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def stable_sort(opset: int) -> Callable[..., Any]:
    """The translation of `aten::sort.stable` for `torch.onnx.export`'s table, in ops of `opset`."""
    from onnxscript import onnx_opset

    op: Any = getattr(onnx_opset, f"opset{opset}")

    def aten_sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return aten_sort_stable
