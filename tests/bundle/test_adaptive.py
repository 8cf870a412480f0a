"""Adaptive schedules in a bundle: every variant gives the drift metric, and the step rule chooses as in torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moeca_compile as moeca
from examples import digits
from moeca_compile.errors import BundleError, LoweringError, MoecaWarning
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.session import Session
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.adaptive import Adaptive
from tests.bundle.conftest import (
    ADAPTIVE,
    EACH_PROVIDER,
    PROVIDERS,
    C,
    Edit,
    F,
    as_model,
    call_of,
    edit_manifest,
    small_model,
)
from tests.bundle.test_output import psnr

pytestmark = pytest.mark.slow

STEPS = 24


def calls(speed: float) -> list[dict[str, Any]]:
    """A latent that moves faster and faster."""
    x, t, y = (one.numpy() for one in call_of(2))
    direction = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    pace = np.cumsum(speed * np.linspace(0, 2, STEPS) ** 2)
    return [{"x": x + np.float32(pace[step]) * direction, "t": t - step, "y": y} for step in range(STEPS)]


@pytest.fixture(scope="module", params=[0.01, 0.05, 0.3])
def run(request: pytest.FixtureRequest) -> tuple[list[dict[str, Any]], list[Any], list[int]]:
    """Calls, what torch gives for them, and the MACs of the variants that it runs, which tell them apart."""
    handle = moeca.compile(small_model(), schedule=ADAPTIVE, inner="eager")
    with torch.no_grad(), moeca.trajectory(handle, steps=STEPS):
        inputs = calls(request.param)
        outputs = [handle(*(torch.from_numpy(call[name]) for name in "xty")).numpy() for call in inputs]
    return inputs, outputs, [record.macs for record in moeca.stats(handle).steps]


@pytest.mark.parametrize("provider", EACH_PROVIDER)
def test_it_chooses_as_torch_does(provider: str, adaptive: Bundle, run: Any) -> None:
    inputs, outputs, macs = run
    with Session.open(adaptive.path, provider, threads=1).trajectory(steps=STEPS) as trajectory:
        found = [trajectory.run(call)["output"] for call in inputs]
        assert [record.macs for record in trajectory.records] == macs
    assert len(set(macs)) > 1
    for result, reference in zip(found, outputs, strict=True):
        assert relative_error(result, reference) < 1e-4


def test_golden_steps_run_every_variant(adaptive: Bundle) -> None:
    assert verify(Session.open(adaptive.path)).variants == ("v0", "v2", "v1")


@pytest.mark.slow
def test_rows_that_the_drift_never_chooses_are_named(tmp_path: Path) -> None:
    never = Schedule(((C, C), (C, F), (F, F)), ADAPTIVE.regions, adaptive=Adaptive((1e9, 1e8), most=50))
    with pytest.warns(MoecaWarning, match="no golden step runs v1: in 26 steps the drift never chose their rows"):
        moeca.export(small_model(), call_of(2), never, tmp_path / "b", dynamic_batch=False)


def test_a_fused_graph_can_not_choose(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="the rows of an adaptive schedule are chosen while a trajectory runs"):
        moeca.export(small_model(), call_of(2), "adaptive:0.1", tmp_path / "b", fused=True)


def state(number: int, **change: Any) -> Edit:
    return lambda data: data["state"][number].update(change)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (state(-1, slot="drift"), "state and schedule differ"),
        (state(-1, region=0), "state and schedule differ"),
        (state(-1, region=-2), r">= -1 - at `\$\.state\[14\]\.region`"),
        (lambda data: data["state"].pop(), "state and schedule differ"),
        (lambda data: data["variants"][2]["writes"].pop(), "doesn't write what its row computes"),
        (lambda data: data["variants"][2]["reads"].append(data["state"][-1]["name"]), "reads state that its row"),
        (lambda data: data["steps"].reverse(), "steps and schedule differ"),
    ],
)
def test_manifests_that_lie(edit: Edit, says: str, adaptive: Bundle, tmp_path: Path) -> None:
    shutil.copytree(adaptive.path, tmp_path / "b")
    edit_manifest(tmp_path / "b", edit)
    with pytest.raises(BundleError, match=says):
        Bundle.open(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_digits_model_chooses_as_in_torch(tmp_path: Path) -> None:
    model, schedule = digits.load_model(), Schedule.by_drift(0.06)
    call = (digits.initial_noise(0, 8), torch.full((8,), 500.0), digits.labels_of(8))
    bundle = moeca.export(model, call, schedule, tmp_path / "b", targets=("onnx", "openvino"))

    def sampled(one: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return digits.sample(one, 3, 4)

    handle = moeca.compile(model, schedule=schedule, inner="eager")
    cached = sampled(handle)
    is_full = [record.macs == record.full_macs for record in moeca.stats(handle).steps]
    assert 5 < sum(is_full) < 40
    for provider in PROVIDERS:
        with Session.open(bundle.path, provider, threads=1).trajectory(steps=50) as trajectory:
            found = sampled(as_model(trajectory))
            assert [record.macs == record.full_macs for record in trajectory.records] == is_full
        assert psnr(found, cached) > 60
