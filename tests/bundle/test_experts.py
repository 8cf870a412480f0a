"""`moeca::experts` in ONNX against torch, on ids that leave experts out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from moeca_compile import ops
from moeca_compile.errors import LoweringError
from moeca_compile.lower.onnx import _quiet
from moeca_compile.lower.onnx_experts import _activate, segments

EXPERTS, TOP_K, DIM, HIDDEN = 4, 2, 8, 12
FORMS = [(name, gated, biased) for name in ops.ACTIVATIONS for gated, biased in ((True, False), (False, True))]


class Everything(nn.Module):
    """One call of the operator in each form."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> list[Tensor]:
            return [torch.randn(*shape, generator=generator) * 0.3 for _ in range(EXPERTS)]

        self.up, self.gate, self.down = make(HIDDEN, DIM), make(HIDDEN, DIM), make(DIM, HIDDEN)
        self.biases = make(HIDDEN), make(DIM), make(HIDDEN)

    def forward(self, x: Tensor, idx: Tensor) -> tuple[Tensor, ...]:
        up, down, gate = self.biases
        return tuple(
            torch.ops.moeca.experts(
                x, idx, self.up, self.down, self.gate if gated else [], up if biased else [], down if biased else [],
                gate if biased and gated else [], name,
            )
            for name, gated, biased in (*FORMS, ("silu", True, True))
        )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], list[Any]]:
    """Exported on ids that hit expert 0 alone."""
    file = tmp_path_factory.mktemp("experts") / "experts.onnx"
    example = torch.randn(3, DIM), torch.zeros(3, TOP_K, dtype=torch.int64)
    tokens = torch.export.Dim("tokens")
    with _quiet():
        exported = torch.export.export(Everything(), example, dynamic_shapes=({0: tokens}, {0: tokens}))
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=20, input_names=["x", "idx"], verbose=False,
            custom_translation_table={torch.ops.moeca.experts.default: segments(20)},
        )  # fmt: skip
    assert program is not None
    program.save(file)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x, idx: session.run(None, {"x": x.numpy(), "idx": idx.numpy()})


IDS = {
    "all": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]]),
    "two of four": torch.tensor([[2, 3], [3, 2], [2, 3]]),
    "one expert": torch.full((6, TOP_K), 3),
    "one token": torch.tensor([[1, 3]]),
}


@pytest.mark.parametrize("which", IDS)
def test_each_form_equals_torch(which: str, run: Callable[[Tensor, Tensor], list[Any]]) -> None:
    idx = IDS[which]
    x = torch.randn(len(idx), DIM, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(run(x, idx), Everything()(x, idx), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_an_activation_without_a_form_is_refused() -> None:
    with pytest.raises(LoweringError, match="no ONNX form of the activation 'swoosh'"):
        _activate(None, None, "swoosh")


def test_it_is_the_only_operator_of_ours() -> None:
    """Another one would need a translation too."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moeca::")}
    assert names == {"moeca::experts"}
