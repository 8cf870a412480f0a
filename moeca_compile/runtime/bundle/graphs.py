"""What stands in an ONNX file, read with the onnx package alone. Weights outside the file aren't looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeca_compile.errors import BundleError


def graph_of(raw: bytes) -> Any:
    """The `onnx.GraphProto` in the bytes of a file.

    Raises:
        BundleError: they aren't ONNX, or onnx isn't installed.
    """
    try:
        import onnx
    except ImportError:
        raise BundleError("reading a graph needs onnx: pip install onnx") from None
    try:
        return onnx.load_model_from_string(raw).graph
    except Exception as error:  # protobuf's own classes
        raise BundleError(f"this isn't an ONNX graph: {error}") from error


def nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes, those of branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():  # GRAPH, GRAPHS
                yield from nodes_of(inner)
