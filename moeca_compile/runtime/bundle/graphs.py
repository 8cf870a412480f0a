"""What stands in an ONNX file, read and edited with the onnx package alone, without the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeca_compile.errors import BundleError


def graph_of(raw: bytes) -> Any:
    """The `onnx.GraphProto` in the bytes of a file.

    Raises:
        BundleError: they aren't ONNX, or onnx isn't installed.
    """
    return _model_of(raw).graph


def with_weights_at(raw: bytes, places: Mapping[tuple[str, int], tuple[str, int]], identity: str) -> bytes:
    """The file for another bundle.

    Args:
        raw: the bytes of the file.
        places: for weights that lie elsewhere there: the file and the offset now, and then.
        identity: the id of that bundle.

    Raises:
        BundleError: as `graph_of`.
    """
    model = _model_of(raw)
    for tensor in model.graph.initializer:
        where = {entry.key: entry for entry in tensor.external_data}
        if where:
            place = where["location"].value, int(where["offset"].value)
            file, offset = places.get(place, place)
            where["location"].value, where["offset"].value = file, str(offset)
    for entry in model.metadata_props:
        if entry.key == "moeca.id":
            entry.value = identity
    return bytes(model.SerializeToString(deterministic=True))


def _model_of(raw: bytes) -> Any:
    try:
        import onnx
    except ImportError:
        raise BundleError("reading a graph needs onnx: pip install onnx") from None
    try:
        return onnx.load_model_from_string(raw)
    except Exception as error:  # protobuf's own classes
        raise BundleError(f"this isn't an ONNX graph: {error}") from error


def nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes, those of branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():  # GRAPH, GRAPHS
                yield from nodes_of(inner)
