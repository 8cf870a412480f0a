"""`moeca::experts` in each of its ONNX forms against torch, on ids that leave experts out, and which form is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.errors import BundleError, LoweringError, OptionError
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.experts.capacity import rows_of
from moeca_compile.lowering.experts.choose import choose
from moeca_compile.lowering.experts.moe import why_not
from moeca_compile.lowering.experts.segments import _activate
from moeca_compile.lowering.onnx.lower import lower_onnx
from moeca_compile.ops import experts as ops
from moeca_compile.pipeline import LOWER_ONNX
from moeca_compile.runtime.providers.onnxruntime import CPU, refuse_swiglu
from moeca_compile.schedule import Action

EXPERTS, TOP_K, DIM, HIDDEN = 4, 2, 16, 24
FORMS = [(name, gated, biased) for name in ops.ACTIVATIONS for gated, biased in ((True, False), (False, True))]
FORMS.append(("silu", True, True))
MOE_FORMS = [form for form in FORMS if not why_not(torch.float32, DIM, HIDDEN, DIM, form[1], form[0])]
Call = Callable[..., tuple[Tensor, ...]]


def all_forms(forms: list[tuple[str, bool, bool]], up_biases_only: bool = False) -> tuple[Call, list[Tensor]]:
    """A function that calls the operator in each form, and its weights: x, ids, weights -> results."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HIDDEN, DIM), (DIM, HIDDEN), (HIDDEN, DIM), (HIDDEN,), (DIM,), (HIDDEN,)]
    weights = [torch.randn(*shape, generator=generator) * 0.3 for shape in shapes for _ in range(EXPERTS)]

    def call(x: Tensor, idx: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        up, down, gate, up_bias, down_bias, gate_bias = (list(flat[i : i + EXPERTS]) for i in range(0, 24, EXPERTS))
        return tuple(
            torch.ops.moeca.experts(
                x, idx, up, down, gate if gated else [], up_bias if biased else [], down_bias if biased else [],
                gate_bias if biased and gated and not up_biases_only else [], name,
            )
            for name, gated, biased in forms
        )  # fmt: skip

    return call, weights


def exported(call: Call, weights: list[Tensor], lowering: str) -> Callable[[Tensor, Tensor], list[Any]]:
    """Exported at two, three and seven tokens that hit expert 0 alone."""
    variants = []
    for tokens in (2, 3, 7):
        example = torch.randn(tokens, DIM), torch.zeros(tokens, TOP_K, dtype=torch.int64)
        gm = make_fx(call, tracing_mode="fake", pre_dispatch=True)(*example, *weights)
        output = next(node for node in gm.graph.nodes if node.op == "output")
        output.args = (tuple(output.args[0]),)
        variants.append(Variant("v0", (Action.COMPUTE,), gm, (), (), (), False, False, len(output.args[0])))
    names = [node.name for node in variants[0].gm.graph.nodes if node.op == "placeholder"]
    outputs = [f"y{i}" for i in range(variants[0].outputs)]
    model, _ = lower_onnx(
        variants, (2, 3, 7), dict(zip(names[2:], weights, strict=True)), dict(zip(names, ("x", "idx"), strict=False)),
        outputs, 20, choose(lowering, ("onnx",))[0], LOWER_ONNX,
    )  # fmt: skip
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda x, idx: session.run(None, {"x": x.numpy(), "idx": idx.numpy()})


IDS = {
    "all": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]]),
    "two of four": torch.tensor([[2, 3], [3, 2], [2, 3]]),
    "the other two": torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]]),
    "one token": torch.tensor([[1, 3]]),
}


@pytest.mark.parametrize(
    ("lowering", "forms"),
    [
        ("segments", FORMS),
        pytest.param("dense", FORMS, marks=pytest.mark.slow),
        pytest.param("capacity:2", FORMS[:2], marks=pytest.mark.slow),
        ("moe", MOE_FORMS),
    ],
)
def test_each_form_equals_torch(lowering: str, forms: list[tuple[str, bool, bool]]) -> None:
    call, weights = all_forms(forms)
    run = exported(call, weights, lowering)
    for idx in IDS.values():
        x = torch.randn(len(idx), DIM, generator=torch.Generator().manual_seed(1))
        for found, wanted in zip(run(x, idx), call(x, idx, *weights), strict=lowering != "capacity:2"):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_experts_with_biases_of_one_projection_alone() -> None:
    call, weights = all_forms([("silu", True, True)], up_biases_only=True)
    idx = IDS["all"]
    x = torch.randn(len(idx), DIM, generator=torch.Generator().manual_seed(1))
    (wanted,) = call(x, idx, *weights)
    (found,) = exported(call, weights, "moe")(x, idx)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_capacity_drops_the_last_branches_and_counts_them() -> None:
    call, weights = all_forms([("silu", True, False), ("gelu", False, True)])
    run = exported(call, weights, "capacity:1")
    idx = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1], [1, 0], [0, 3]])  # an even routing gives each three rows
    x = torch.randn(len(idx), DIM, generator=torch.Generator().manual_seed(1))
    *found, dropped = run(x, idx)
    late = torch.zeros(idx.shape, dtype=torch.bool)
    late[4, 1] = late[5, 0] = True
    assert dropped == 2 * len(found)
    for y, wanted in zip(found, call(x, idx, *weights), strict=True):
        np.testing.assert_allclose(y, wanted.masked_fill(late.unsqueeze(-1), 0).numpy(), rtol=1e-4, atol=1e-5)


def test_rows_of_a_capacity() -> None:
    assert rows_of((2, 1), branches=8, experts=4) == 5
    assert rows_of((5, 4), branches=10, experts=4) == 4  # 3.125
    assert rows_of((1, 1), branches=1, experts=64) == 1


@pytest.mark.parametrize(
    ("asked", "targets", "moe_unfit", "wanted"),
    [
        ("auto", ("onnx",), "", "segments"),
        ("auto", ("onnx", "openvino"), "", "segments"),
        ("auto", ("tensorrt",), "", "dense"),
        ("auto", ("cuda",), "", "moe"),
        ("auto", ("cuda",), "gated relu", "dense"),
        ("auto", ("onnx", "tensorrt"), "", "dense"),
        ("capacity", ("tensorrt",), "", "capacity:2"),
        ("capacity:1.25", ("onnx",), "", "capacity:1.25"),
        ("segments", ("cuda",), "", "segments"),
    ],
)
def test_the_form_follows_the_targets(asked: str, targets: tuple[str, ...], moe_unfit: str, wanted: str) -> None:
    assert str(choose(asked, targets, moe_unfit)[0]) == wanted


def test_targets_that_differ_are_told_apart() -> None:
    assert choose("auto", ("onnx", "tensorrt"))[1] == "onnx would run 'segments' faster"
    assert choose("auto", ("onnx", "openvino"))[1] == ""


@pytest.mark.parametrize("text", ["loops", "capacity:0", "capacity:-1", "dense:2", "capacity:", "Auto", "segments\n"])
def test_an_unknown_form_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="experts="):
        choose(text, ("onnx",))


@pytest.mark.parametrize(
    ("asked", "target", "moe_unfit", "says"),
    [
        ("segments", "tensorrt", "", "'tensorrt' runs dense, capacity only"),
        ("moe", "openvino", "", "'openvino' runs"),
        ("moe", "cuda", "gated relu", "doesn't take gated relu"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(asked: str, target: str, moe_unfit: str, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        choose(asked, (target,), moe_unfit)


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ((torch.float32, 16, 16, 16, True, "gelu"), "gated gelu"),
        ((torch.float32, 16, 16, 16, False, "gelu"), "the activation gelu"),
        ((torch.float32, 16, 16, 32, True, "silu"), "from 16 to 32"),
        ((torch.float32, 16, 8, 16, True, "silu"), "needs 16"),
        ((torch.float64, 16, 16, 16, True, "silu"), "float64"),
    ],
)
def test_what_the_moe_operator_does_not_take(experts: tuple[Any, ...], says: str) -> None:
    assert says in why_not(*experts)


def test_an_activation_without_a_form_is_refused() -> None:
    with pytest.raises(LoweringError, match="no ONNX form of the activation 'swoosh'"):
        _activate(None, None, "swoosh")


def test_it_is_the_only_operator_of_ours_that_a_bundle_meets() -> None:
    """Another one would need a translation too. `expand_slots` takes those of PARTIAL rows apart, and an export leaves
    the passes out that insert `unwritten`, change kept branches in place, and choose for such rows (`top_k`)."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moeca::")}
    in_place = {
        "moeca::branches_",
        "moeca::branches_.at",
        "moeca::forecast_branches",
        "moeca::keep_branches_",
        "moeca::top_k",
    }
    assert names - in_place - {"moeca::align", "moeca::pick", "moeca::unwritten"} == {"moeca::experts"}


def test_swiglu_on_an_onnxruntime_that_ignores_its_constants() -> None:
    graph, cuda = b"... swiglu_fusion ...", "CUDAExecutionProvider"
    for provider in (cuda, "TensorrtExecutionProvider"):  # which leaves it to CUDA
        with pytest.raises(BundleError, match=r"v0.onnx has .* onnxruntime 1\.27\.1 ignores on CUDA: install 1\.28"):
            refuse_swiglu(graph, "v0.onnx", provider, "1.27.1")
    refuse_swiglu(graph, "v0.onnx", cuda, "1.28.0")
    refuse_swiglu(graph, "v0.onnx", CPU, "1.27.1")
    refuse_swiglu(b"... MoE with relu ...", "v0.onnx", cuda, "1.9")
