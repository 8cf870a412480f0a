"""Opsets from 23 on: attention, RMS norms and rotary embeddings as one operator each; which targets take them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import OptionError
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import PROVIDERS, call_of, small_model


class Normed(nn.Module):
    """Attention with RMS norms of its input, queries and keys, which a rotary embedding turns."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.time = heads, nn.Linear(1, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.of_queries, self.of_keys = (
            nn.RMSNorm(size, eps=1e-6) for size in (width, width // heads, width // heads)
        )

        self.register_buffer("angles", torch.randn(8, width // heads // 2))

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = (table.repeat_interleave(2, dim=-1) for table in (self.angles.cos(), self.angles.sin()))
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x) + self.time(t[:, None])[:, None]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.turn(self.of_queries(q)), self.turn(self.of_keys(k))
        attention = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attention.transpose(1, 2).flatten(2))


def test_attention_and_norms_are_one_operator_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed().eval().requires_grad_(False)
    call = torch.randn(2, 8, 16), torch.rand(2)
    bundle = moeca.export(model, call, "uniform:2", tmp_path / "b", targets=("onnx", "openvino"), opset=23)
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "b" / "v0.onnx").graph.node)
    assert (counts["Attention"], counts["RMSNormalization"], counts["RotaryEmbedding"]) == (1, 3, 2)
    assert not {"Softmax", "Neg"} & set(counts)
    assert bundle.manifest.opset == 23
    for provider in PROVIDERS:
        assert verify(Session.open(bundle.path, provider)).error < 1e-5


@pytest.mark.slow
def test_routed_experts_at_the_newest_opset(tmp_path: Path) -> None:
    bundle = moeca.export(small_model(), call_of(2), "full", tmp_path / "b", opset=24, dynamic_batch=False)
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "b" / "v0.onnx").graph.node)
    assert (counts["Attention"], counts["NonZero"]) == (1, 4)
    assert verify(Session.open(bundle.path)).error < 1e-5


def test_tensorrt_takes_no_opset_with_an_attention_operator(tmp_path: Path) -> None:
    says = (
        r"opset=23: expected 18 to 20 for targets=\['onnx', 'tensorrt'\]. Leave opset out, or export a bundle of "
        "its own for 'tensorrt'"
    )
    with pytest.raises(OptionError, match=says):
        moeca.export(small_model(), call_of(2), "full", tmp_path / "b", targets=("onnx", "tensorrt"), opset=23)


def test_an_opset_that_no_target_takes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"opset=25: expected 18 to 24 for targets=\['onnx'\]. Leave opset out$"):
        moeca.export(small_model(), call_of(2), "full", tmp_path / "b", opset=25)
