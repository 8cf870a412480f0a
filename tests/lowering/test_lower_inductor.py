"""What is asked of Inductor beyond its defaults, and that it arrives there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.errors import LoweringError
from moeca_compile.lowering.inductor.lower import IN_ONE_KERNEL, MANY_STATES, _for_device, lower_inductor

X = torch.arange(6.0)


def variant(states: int = 0) -> Any:
    def run(x: Tensor) -> list[Tensor]:
        return [x.sin() + 1]

    gm = make_fx(run, tracing_mode="fake")(X)
    return SimpleNamespace(
        name="v1", gm=gm, reads=tuple(range(states)), wants_coefficients=False, changes=(), node_count=3
    )


def tensors(device: str) -> list[Any]:
    with FakeTensorMode():
        return [torch.empty(2, device="cpu"), torch.empty(2, device=device), 3]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Inductor's options while it makes kernels."""
    found: list[dict[str, Any]] = []
    codegen = GraphLowering.codegen

    def spy(self: GraphLowering) -> Any:
        found.append({name: getattr(config, name) for name in ("max_fusion_size", "max_autotune")})
        return codegen(self)

    monkeypatch.setattr(GraphLowering, "codegen", spy)
    with config.patch(force_disable_caches=True):
        yield found


@pytest.mark.parametrize(
    ("device", "states", "found"),
    [
        ("cuda", MANY_STATES + 1, {"max_fusion_size": IN_ONE_KERNEL}),
        ("cuda", MANY_STATES, {}),
        ("cpu", MANY_STATES + 1, {}),
    ],
)
def test_many_states_are_not_read_in_one_kernel_on_a_gpu(device: str, states: int, found: dict[str, int]) -> None:
    assert _for_device(variant(states), tensors(device)) == found


@pytest.mark.slow
def test_what_a_gpu_wants_reaches_inductor(seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moeca_compile.lowering.inductor.lower._for_device", lambda *_: {"max_fusion_size": IN_ONE_KERNEL}
    )
    lower_inductor(variant(), [X])
    assert [one["max_fusion_size"] for one in seen] == [IN_ONE_KERNEL]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"max_fusion_size": config.max_fusion_size, "max_autotune": config.max_autotune}),
        pytest.param(
            {"inner_options": {"max_fusion_size": 3}},
            {"max_fusion_size": 3, "max_autotune": config.max_autotune},
            marks=pytest.mark.slow,
        ),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_fusion_size": config.max_fusion_size, "max_autotune": True}),
    ],
)
def test_mode_and_options_reach_inductor(
    asked: dict[str, Any], found: dict[str, Any], seen: list[dict[str, Any]]
) -> None:
    (result,) = lower_inductor(variant(), [X], **asked)([X])
    torch.testing.assert_close(result, X.sin() + 1)
    assert seen == [found]


def test_an_option_that_inductor_has_not_is_refused_by_name() -> None:
    with pytest.raises(LoweringError, match=r"\['max_fusion_sise'\] are no options of Inductor"):
        lower_inductor(variant(), [X], inner_options={"max_fusion_sise": 3})
