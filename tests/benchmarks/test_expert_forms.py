"""The benchmarks of expert forms, of opsets and of rotary embeddings run, in their quick form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import expert_forms, opsets, quantized_products, rotary
from benchmarks.expert_forms import Layer, onnxruntime_session
from benchmarks.expert_graphs import operator_forms, quantize


@pytest.mark.slow
def test_every_form_is_measured_or_refused(tmp_path: Path) -> None:
    expert_forms.main(["--quick", "--out", str(tmp_path)])
    forms = json.loads((tmp_path / "expert_forms.json").read_text())["small"]["forms"]
    exact = ["segments", "dense", "moe", "moe of K"]
    for name in (*(f"onnxruntime, {form}" for form in exact), "OpenVINO, segments", "OpenVINO, dense"):
        assert forms[name]["relative_error"] < 1e-5
        assert forms[name]["bytes"] > 0
    assert 1e-4 < forms["onnxruntime, qmoe of 8 bits"]["relative_error"] < 0.05
    assert "refused" in forms["OpenVINO, moe"]


@pytest.mark.parametrize("gate", [0.5, 0.0, -0.5])
def test_the_operators_that_weight_themselves_are_wrong_for_a_negative_gate(gate: float) -> None:
    rng = np.random.default_rng(0)
    layer = Layer(8, 32, 32, 4, 2)
    up, down, gates_of = (rng.standard_normal((4, 32, 32)).astype(np.float32) * 32**-0.5 for _ in range(3))
    x = rng.standard_normal((8, 32)).astype(np.float32)
    idx = rng.random((8, 4)).argsort(1)[:, :2].copy()
    gates = np.full((8, 2), 0.5, np.float32)
    gates[3, 1] = gate

    def error(form: str, weights: list[Any]) -> float:
        model = operator_forms(layer, up, down, gates_of)[form]
        found = onnxruntime_session(model.SerializeToString())({"x": x, "idx": idx, "gates": gates})
        rows = np.broadcast_to(x[:, None], (8, 2, 32)).astype(np.float64)
        one, two, three = (weight[idx] for weight in weights)
        inner = np.einsum("tkid,tkd->tki", three, rows)
        hidden = inner / (1 + np.exp(-inner)) * np.einsum("tkid,tkd->tki", one, rows)
        expected = (np.einsum("tkoi,tki->tko", two, hidden) * gates[..., None]).sum(1)
        return float(abs(found - expected).max() / abs(expected).max())

    assert (error("moe of K", [up, down, gates_of]) < 1e-5) is (gate >= 0)
    dequantized = [(values.astype(np.float64) - 128) * scales[..., None] for values, scales in
                   (quantize(weight, 8) for weight in (up, down, gates_of))]  # fmt: skip
    assert (error("qmoe of 8 bits", dequantized) < 1e-5) is (gate >= 0)


@pytest.mark.slow
def test_products_and_layers_of_quantized_weights_are_measured(tmp_path: Path) -> None:
    quantized_products.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "quantized_products.json").read_text())
    for part, forms in (("products", ("DequantizeLinear", "MatMulNBits")), ("layers", ("segments", "QMoE"))):
        for found in written[part].values():
            assert all(found[form]["relative_error"] < 1e-5 for form in ("float32", *forms))
    assert written["products"]["small, 4 bits"]["MatMulNBits, 8-bit inputs"]["relative_error"] > 1e-4


@pytest.mark.slow
def test_every_opset_is_measured(tmp_path: Path) -> None:
    opsets.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "opsets.json").read_text())
    for name in opsets.MODELS:
        graphs = written[name]["graphs"]
        assert graphs["opset 23"]["nodes"] < graphs["opset 20"]["nodes"]
        assert graphs["opset 23"]["operators"]["Attention"] > 0
        assert list(written[name]["step"]) == list(opsets.PROVIDERS)


@pytest.mark.slow
def test_rotary_embeddings_are_measured(tmp_path: Path) -> None:
    rotary.main(["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "rotary.json").read_text())
    for form in rotary.FORMS:
        for runtime in expert_forms.RUNTIMES:
            assert all(found["error"] < 1e-5 for found in written["small"][form][runtime].values())
