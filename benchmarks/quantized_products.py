"""Quantized weights on onnxruntime's CPU provider: a product and a layer of experts in each form, time and error.

    python -m benchmarks.quantized_products            # about 2 minutes; writes results/quantized_products.json
    python -m benchmarks.quantized_products --quick    # one small size, few rounds: does it run?

The error is the largest difference from the dequantized weights in float64, over the largest value: how exact the
arithmetic is, not what quantization costs. The layer's forms are those that an export writes ("segments", over float32,
8-bit and 4-bit weights with a scale a row) and onnxruntime's operator QMoE, which weights and sums too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.expert_forms import LAYERS, Layer, figures, onnxruntime_session
from benchmarks.protocol import arguments, folder_of, interleave, pin_threads, save

BASE = "float32"
SIZES = {"512 rows, 384 to 1536": (512, 384, 1536), "64 rows, 384 to 1536": (64, 384, 1536),
         "8 rows, 384 to 1536": (8, 384, 1536), "256 rows, 96 to 72": (256, 96, 72)}  # fmt: skip
NAMES = ("DiT-MoE-S/2", "digits DSMoE", "the same, 128 tokens")
BLOCK, ROUNDS = 32, 11
Run = Callable[[], Any]


def products(rows: int, width: int, out: int, bits: int) -> tuple[dict[str, Run], Any]:
    """x [rows, width] times a weight [out, width] of `bits` bits, with a scale for 32 values; and the right result."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    integers = rng.integers(0, 2 * half, (out, width)).astype(np.uint8)
    scales = ((rng.random((out, width // BLOCK)) + 0.1) / half).astype(np.float32)
    weight = (integers.astype(np.float32) - half) * np.repeat(scales, BLOCK, 1)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    blocks = integers.reshape(out, -1, BLOCK)
    packed = blocks if bits == 8 else blocks[..., ::2] | blocks[..., 1::2] << 4
    signed = (integers.astype(np.int16) - half).astype(np.int8).reshape(-1, BLOCK)
    numbers = {"N": out, "K": width, "bits": bits, "block_size": BLOCK, "domain": "com.microsoft"}
    node = helper.make_node
    forms: dict[str, tuple[list[Any], dict[str, Any]]] = {
        BASE: ([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": weight}),
        "DequantizeLinear": (
            [
                node("DequantizeLinear", ["q", "s"], ["d"], axis=0),
                node("Reshape", ["d", "sizes"], ["w"]),
                node("Gemm", ["x", "w"], ["y"], transB=1),
            ],
            {"q": signed, "s": scales.reshape(-1), "sizes": np.array([out, width])},
        ),
        "MatMulNBits": ([node("MatMulNBits", ["x", "q", "s"], ["y"], accuracy_level=1, **numbers)],
                        {"q": packed, "s": scales}),
        "MatMulNBits, 8-bit inputs": ([node("MatMulNBits", ["x", "q", "s"], ["y"], accuracy_level=4, **numbers)],
                                      {"q": packed, "s": scales}),
    }  # fmt: skip
    runs = {}
    for form, (nodes, constants) in forms.items():
        graph = helper.make_graph(
            nodes, "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        runs[form] = partial(onnxruntime_session(model.SerializeToString()), {"x": x})
    return runs, x.astype(np.float64) @ weight.astype(np.float64).T


def layers(layer: Layer, bits: int, folder: Path) -> tuple[dict[str, Run], Any]:
    """The forms of a layer, and the right result."""
    from benchmarks.expert_graphs import quantized_graphs

    graphs, feeds, expected = quantized_graphs(layer, bits, folder)
    return {form: partial(onnxruntime_session(path), feeds) for form, path in graphs.items()}, expected


def measure(make: Callable[[], tuple[dict[str, Run], Any]], rounds: int) -> dict[str, Any]:
    runs, expected = make()
    repeated = {form: partial(_several, run) for form, run in runs.items()}
    timings = interleave(repeated, rounds=rounds)
    found = {form: figures(timing, timings[BASE]) for form, timing in timings.items()}
    for form, run in runs.items():
        found[form]["relative_error"] = float(abs(run() - expected).max() / abs(expected).max())
        found[form]["median_ms"] /= _SEVERAL
    return found


_SEVERAL = 3  # runs in one figure


def _several(run: Run) -> None:
    for _ in range(_SEVERAL):
        run()


def told(name: str, bits: int, make: Callable[[], tuple[dict[str, Run], Any]], rounds: int) -> dict[str, Any]:
    found = measure(make, rounds)
    facts = {form: (round(one["ratio"], 2), f"{one['relative_error']:.0e}") for form, one in found.items()}
    print(f"{name}, {bits} bits: {json.dumps(facts)}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments("Measure products with quantized weights.", "one small size, few rounds").parse_args(argv)
    pin_threads()
    sizes = {"small": (4, 32, 16)} if args.quick else SIZES
    shapes = {"small": Layer(32, 32, 32, 4, 2)} if args.quick else {name: LAYERS[name] for name in NAMES}
    rounds = 4 if args.quick else ROUNDS
    payload: dict[str, Any] = {"products": {}, "layers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for bits in (8, 4):
            for name, size in sizes.items():
                payload["products"][f"{name}, {bits} bits"] = told(name, bits, partial(products, *size, bits), rounds)
            for name, layer in shapes.items():
                make = partial(layers, layer, bits, Path(folder))
                payload["layers"][f"{name}, {bits} bits"] = told(name, bits, make, rounds)
    out = folder_of(args)
    if out:
        print(f"written: {save('quantized_products', payload, out).name}")


if __name__ == "__main__":
    main()
