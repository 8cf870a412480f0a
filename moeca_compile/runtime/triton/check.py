"""Is a `config.pbtxt` that of the graphs beside it? Triton itself looks only when it loads the model, and at less.

What is compared are the ONNX files' own inputs and outputs, not what the manifest says of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.graphs import graph_of
from moeca_compile.runtime.bundle.manifest import COEFFICIENTS, DROPPED, Dim, TensorSpec, known_dim
from moeca_compile.runtime.triton.config import CONTROLS, TYPES, at_the_face, sizes_of
from moeca_compile.runtime.triton.pbtxt import loads, many

Specs = dict[str, TensorSpec]


def check_python(text: str, graphs: Sequence[bytes]) -> None:
    """The config of the python backend, against all variants of its bundle.

    Raises:
        BundleError: what differs.
    """
    config = loads(text)
    inputs: Specs = {}
    outputs: Specs = {}
    for graph in graphs:
        ins, outs = signature_of(graph)
        inputs |= {k: at_the_face(v) for k, v in ins.items() if not k.startswith("state_") and k != COEFFICIENTS}
        outputs |= {k: at_the_face(v) for k, v in outs.items() if not k.startswith("state_") and k != DROPPED}
    _compare("inputs", _tensors(config, "input"), inputs, batch=-1)
    _compare("outputs", _tensors(config, "output"), outputs, batch=-1)
    controls = [one.get("name") for one in many(config.get("sequence_batching", {}), "control_input")]
    _demand(sorted(map(str, controls)) == sorted(CONTROLS), f"the controls are {controls}, the model reads {CONTROLS}")


def check_state(text: str, graph: bytes, batch: int) -> None:
    """The config of a graph whose state the server keeps.

    Raises:
        BundleError: what differs; or two states whose inputs sort differently from their outputs, which Triton swaps
            (triton-inference-server/server#8586).
    """
    config = loads(text)
    inputs, outputs = signature_of(graph)
    states = many(config.get("sequence_batching", {}), "state")
    ins, outs = ([str(one.get(side)) for one in states] for side in ("input_name", "output_name"))
    _compare("inputs", _tensors(config, "input") | _named(states, ins), inputs, batch)
    _compare("outputs", _tensors(config, "output") | _named(states, outs), outputs, batch)
    pairs = list(zip(ins, outs, strict=True))
    _demand(
        [outs for _, outs in sorted(pairs)] == sorted(outs),
        "the states' inputs sort differently from their outputs, and Triton would swap them (server#8586)",
    )
    for one, (name, _) in zip(states, pairs, strict=True):
        first = many(one, "initial_state")
        same = len(first) == 1 and all(first[0].get(key) == one.get(key) for key in ("data_type", "dims"))
        _demand(same and first[0].get("zero_data") is True, f"{name} doesn't begin as zeros of its own size")


def signature_of(graph: bytes) -> tuple[Specs, Specs]:
    """The inputs and the outputs of an ONNX file, by name.

    Raises:
        BundleError: it isn't one, or a size of it is neither a number nor known from the batch.
    """
    found = graph_of(graph)
    import onnx

    constants = {one.name for one in found.initializer}
    called = {"float64": "DOUBLE", "float32": "FLOAT"}
    ours = {int(onnx.TensorProto.DataType.Value(called.get(name, name.upper()))): name for name in TYPES}

    def specs(values: Iterable[Any]) -> Specs:
        return {one.name: _spec(one, ours) for one in values if one.name not in constants}

    return specs(found.input), specs(found.output)


def _spec(value: Any, dtypes: Mapping[int, str]) -> TensorSpec:
    kind = value.type.tensor_type
    sizes: list[Dim] = []
    for dim in kind.shape.dim:
        size: Dim = dim.dim_param if dim.HasField("dim_param") else dim.dim_value
        _demand(known_dim(size), f"{value.name}: the size {size!r} is neither a number nor known from the batch")
        sizes.append(size)
    _demand(kind.elem_type in dtypes, f"{value.name} has ONNX's data type {kind.elem_type}, which is none of ours")
    return TensorSpec(value.name, dtypes[kind.elem_type], tuple(sizes))


def _tensors(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    found = many(config, side)
    return _named(found, [str(one.get("name")) for one in found])


def _named(messages: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    _demand(len(set(names)) == len(names), f"a name stands twice among {list(names)}")
    return dict(zip(names, messages, strict=True))


def _compare(side: str, given: Mapping[str, Any], wanted: Specs, batch: int) -> None:
    _demand(set(given) == set(wanted), f"the {side} are {sorted(given)}, the graph's are {sorted(wanted)}")
    for name, spec in wanted.items():
        one, sizes = given[name], sizes_of(spec, batch)
        kind, dims = one.get("data_type"), many(one, "dims")
        fits = (kind, dims, one.get("reshape")) == (TYPES[spec.dtype], sizes["dims"], sizes.get("reshape"))
        _demand(fits, f"{name} is {kind} {dims}, the graph has {TYPES[spec.dtype]} {sizes['dims']} ({spec})")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BundleError(f"config.pbtxt: {otherwise}")
