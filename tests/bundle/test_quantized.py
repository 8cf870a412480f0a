"""Bundles of quantized models: weights of 8 and 4 bits in the file, results of torch's quantized model."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, MoecaWarning
from moeca_compile.runtime.bundle.manifest import WEIGHTS
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import PROVIDERS, as_model, call_of, small_model, warnings_of
from tests.frontend.test_quantized import Unknown, quantize

STEPS = 50
SHARE = {"int8": 1 / 4 + 1 / 64, "int4, groups of 16": 1 / 8 + 1 / 16 + 1 / 128}  # scales are a part of it


def model_of(config: str) -> nn.Module:
    model = small_model(dim=64, hidden=128, num_experts=6)
    quantize(model, config)
    return model


def shared(model: nn.Module) -> tuple[int, int]:
    """Bytes of the model's weights in float32: of those that are quantized, and of the others."""
    quantized = others = 0
    for weight in model.state_dict(keep_vars=True).values():
        is_plain = type(weight) in (torch.Tensor, nn.Parameter)
        quantized, others = quantized + 4 * weight.numel() * (not is_plain), others + 4 * weight.numel() * is_plain
    return quantized, others


def operators(path: Path) -> Counter[str]:
    graphs = [onnx.load(file, load_external_data=False).graph for file in path.glob("*.onnx")]
    return Counter(node.op_type for graph in graphs for node in graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("config", SHARE, ids=["int8", "int4"])
def test_a_bundle_is_as_small_as_the_model_and_gives_its_results(config: str, tmp_path: Path) -> None:
    model = model_of(config)
    assert not warnings_of(
        lambda: moeca.export(
            model, call_of(2), "uniform:3", tmp_path / "b", targets=("onnx", "openvino"), dynamic_batch=False
        )
    )
    quantized, others = shared(model)
    zeros = 4 * 2 * 16 * 2 * 64  # that the results of two samples' branches are scattered into
    assert (tmp_path / "b" / WEIGHTS).stat().st_size <= SHARE[config] * quantized + others + zeros
    found = operators(tmp_path / "b")
    assert found["MatMulNBits" if config != "int8" else "DequantizeLinear"] >= 18 + 4  # experts, and linear layers
    assert found["MatMul"] == 2  # those of attention

    compiled = moeca.compile(model, schedule="uniform:3", inner="eager")
    for provider in PROVIDERS:
        session = Session.open(tmp_path / "b", provider, threads=1)
        assert verify(session).error < 1e-5  # every variant
        with session.trajectory() as trajectory, torch.no_grad():
            moeca.reset(compiled)
            ours, theirs = (sampled(run) for run in (as_model(trajectory), compiled))
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def sampled(model: Any) -> torch.Tensor:
    """Euler's method over `STEPS` steps."""
    x, _, y = call_of(2)
    for step in range(STEPS):
        x = x - model(x, torch.full((2,), 1000.0 * (1 - step / STEPS)), y) / STEPS
    return x


@pytest.mark.slow
def test_float8_weights_are_told_of(tmp_path: Path) -> None:
    model = small_model()
    quantize(model, "float8")
    with pytest.warns(MoecaWarning, match=r"quantized weights become float32 .*\(Float8Tensor\).* and \d+ more"):
        moeca.export(model, call_of(2), "uniform:3", tmp_path / "b", dynamic_batch=False)


def test_a_class_that_nobody_knows_is_named(tmp_path: Path) -> None:
    model = small_model()
    layer: Any = model.blocks[0].proj
    layer.weight = nn.Parameter(Unknown((2.0 * layer.weight).round().to(torch.int8)), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        says = (
            r"as one graph.*1 weights are of classes that no graph can look into.*blocks\.0\.proj\.weight \(Unknown\)"
        )
        with pytest.raises(CaptureError, match=says):
            moeca.export(model, call_of(2), "uniform:3", tmp_path / "b", dynamic_batch=False)
