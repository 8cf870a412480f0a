"""Real model code as bundles."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import moeca_compile as moeca
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import PROVIDERS
from tests.real.zoo import ZOO

FIXED = {"HiDreamImage"}  # it loops over its samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of diffusers
]


@pytest.mark.parametrize("name", ["HiDreamImage", "DiT", "PixArt", "SD3", "Flux", "Wan", "NucleusMoEImage"])
def test_it_equals_torch_at_its_batches(name: str, tmp_path: Path) -> None:
    model = ZOO[name]
    bundle = moeca.export(model.build(), model.inputs(0), "uniform:2", tmp_path / "b", dynamic_batch=name not in FIXED)
    assert {one.name for one in bundle.manifest.inputs} <= set(model.inputs(0))
    assert [one.name for one in bundle.manifest.outputs] == ["sample"]
    assert bundle.manifest.timestep == model.timestep
    assert verify(Session.open(bundle.path, threads=1)).passed


@pytest.mark.parametrize("name", ["LTXVideo", "PRX", "HunyuanImage", "ErnieImage"])
def test_attentions_with_masks_of_prompts(name: str, tmp_path: Path) -> None:
    model = ZOO[name]
    bundle = moeca.export(
        model.build(), model.inputs(0), "uniform:2", tmp_path / "b", targets=("onnx",), opset=23, dynamic_batch=False
    )
    nodes = onnx.load(bundle.path / "v0.onnx", load_external_data=False).graph.node
    assert any(node.op_type == "Attention" and len(node.input) == 4 for node in nodes)
    assert verify(Session.open(bundle.path, threads=1)).error < 1e-4


@pytest.mark.parametrize(
    ("name", "count"), [("Flux", 6), ("Chroma", 6), ("Wan", 4), ("QwenImage", 6), ("CogView4", 4), ("MiniMaxH3", 4)]
)
def test_rotary_embeddings_are_one_operator_each(name: str, count: int, tmp_path: Path) -> None:
    model = ZOO[name]
    bundle = moeca.export(
        model.build(), model.inputs(0), "uniform:2", tmp_path / "b", targets=("onnx", "openvino"), opset=23,
        dynamic_batch=False,
    )  # fmt: skip
    nodes = onnx.load(bundle.path / "v0.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == count
    for provider in PROVIDERS:
        assert verify(Session.open(bundle.path, provider, threads=1)).error < 1e-5
