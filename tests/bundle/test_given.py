"""What an export is given: targets, example inputs, and models that an ordinary first call changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import moeca_compile as moeca
from moeca_compile.errors import CaptureError, OptionError
from tests.bundle.conftest import call_of
from tests.models import DiT


class Attention(nn.Module):
    """Self-attention under a rotary embedding in complex numbers, whose table the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("angles", torch.arange(16)[:, None] * torch.rand(4)[None])
        self.known: int | None = None

    def turned(self, x: Tensor) -> Tensor:  # [B, H, N, 8]
        if self.known is None or x.shape[2] > self.known:
            self.known = x.shape[2]
            self.register_buffer("table", torch.polar(torch.ones_like(self.angles), self.angles), persistent=False)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.table[None, None]
        return torch.view_as_real(pairs).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.attention = nn.Linear(2, 16), Attention()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.time(torch.stack([t.sin(), t.cos()], -1))[:, None] * self.attention(x)
        return x + self.mlp(x)


@pytest.mark.slow
def test_a_rotary_embedding_in_complex_numbers_made_at_the_first_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Rotary().eval().requires_grad_(False)
    inputs = torch.randn(2, 16, 16), torch.full((2,), 3.0)
    bundle = moeca.export(model, inputs, "uniform:3", tmp_path / "b", targets="onnx")
    assert bundle.manifest.golden.measured[0].relative_error < 1e-6
    assert bundle.manifest.targets == ("onnx",)


def test_one_target_may_be_a_text(tmp_path: Path, model: DiT) -> None:
    with pytest.raises(OptionError, match=r"targets=\['onnxruntime'\]: onnxruntime can't be exported to"):
        moeca.export(model, call_of(2), "full", tmp_path / "b", targets="onnxruntime")


@pytest.mark.parametrize("example", [call_of(2)[0], None, 3])
def test_example_inputs_are_a_tuple_or_a_mapping(tmp_path: Path, model: DiT, example: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a tuple or a mapping of keywords, got \w+; .* write \(x,\)"):
        moeca.export(model, example, "full", tmp_path / "b")


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ((call_of(2)[0],), r"DiT can't be called with the example inputs \(1 positional\): TypeError: .*missing 2"),
        ({"x": call_of(2)[0], "time": call_of(2)[1]}, r"\(x, time\): TypeError: .*unexpected keyword"),
        (call_of(2)[::-1], "can't be called with the example inputs"),
    ],
)
def test_example_inputs_that_the_model_does_not_take(tmp_path: Path, model: DiT, example: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        moeca.export(model, example, "full", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
