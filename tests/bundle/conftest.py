"""One small model, exported once for all tests here, with a schedule of three different rows."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.exporting.request import Captured, capture
from moeca_compile.options import Options
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import MANIFEST, digest_of
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.schedule import Action, Partial, Schedule
from moeca_compile.schedule.adaptive import Adaptive
from tests.models import DiT
from tests.tools import UNHOISTED, row

PROVIDERS = ("CPUExecutionProvider", "openvino")
# What every runtime has to do: onnxruntime shows it in each run of the tests, OpenVINO among the slow ones.
EACH_PROVIDER = (PROVIDERS[0], pytest.param(PROVIDERS[1], marks=pytest.mark.slow))
Edit = Callable[[dict[str, Any]], None]
C, F = Action.COMPUTE, Action.FORECAST
ADAPTIVE = Schedule(
    ((C, C), (C, Partial(0, 0.3)), (F, F)), ("blocks.0", "blocks.0.moe"), adaptive=Adaptive((0.3, 0.1), most=6)
)


def small_model(**sizes: Any) -> DiT:
    torch.manual_seed(0)
    return DiT("numpy", **{"depth": 1, "dim": 16, "hidden": 24, "heads": 2, **sizes}).eval().requires_grad_(False)


def call_of(batch: int, seed: int = 0, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, t and y of one call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
    return x, torch.full((batch,), 500.0 - seed), torch.randint(0, 10, (batch,), generator=generator)


def named(call: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    return {name: one.numpy() for name, one in zip("xty", call, strict=True)}


def as_model(trajectory: Trajectory) -> Callable[..., torch.Tensor]:
    """A bundle's trajectory as the model that was exported: a call is the next step."""

    def run(*call: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(trajectory.run(named(call))["output"])

    return run


def warnings_of(run: Callable[[], object]) -> list[str]:
    """The warnings of ours that a run gives, each as often as it is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MoecaWarning)
        run()
    return [str(one.message) for one in caught]


@pytest.fixture(scope="session")
def model() -> DiT:
    return small_model()


@pytest.fixture(scope="session")
def schedule(model: DiT) -> Schedule:
    """All computed, all forecast, attention only, all forecast; the last three for ever."""
    keys = tuple(region.key for region in moeca.explain(model, *call_of(2), inner="eager").regions)
    assert len(keys) == 2
    return Schedule((row("CC"), row("FF"), row("CF"), row("CC"), row("FR")), keys, order=1, period=4)


@pytest.fixture(scope="session")
def exported(model: DiT, schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return moeca.export(
        model,
        call_of(2),
        schedule,
        tmp_path_factory.mktemp("bundles") / "small.moeca",
        fused=True,
        targets=("onnx", "openvino"),
    )


@pytest.fixture(scope="session")
def closed(model: DiT, schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For one batch, with a schedule of three recorded timesteps that ends."""
    ends = replace(schedule, rows=schedule.rows[:3], period=0, timesteps=(900.0, 600.0, 300.0))
    path = tmp_path_factory.mktemp("closed") / "b"
    return moeca.export(model, call_of(2), ends, path, fused=True, dynamic_batch=False)


@pytest.fixture(scope="session")
def adaptive(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Rows that depend on the drift, one of which computes a part of the branches."""
    path = tmp_path_factory.mktemp("adaptive") / "b"
    return moeca.export(model, call_of(2), ADAPTIVE, path, targets=("onnx", "openvino"))


@pytest.fixture(scope="session", params=EACH_PROVIDER)
def session(exported: Bundle, request: pytest.FixtureRequest) -> Session:
    return Session.open(exported.path, request.param, threads=1)


@pytest.fixture(scope="session")
def torch_side(model: DiT, schedule: Schedule, exported: Bundle) -> Captured:
    """The same graph in torch, at a batch that the export never saw."""
    return capture(model, call_of(4), Options(schedule=schedule, inner="eager", disable=UNHOISTED))


@pytest.fixture
def copy(exported: Bundle, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    shutil.copytree(exported.path, tmp_path / "copy")
    return tmp_path / "copy"


def edit_manifest(folder: Path, edit: Edit) -> None:
    """Change the manifest as somebody would who knows how to seal it again."""
    data = json.loads((folder / MANIFEST).read_text())
    edit(data)
    data["digest"] = digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data))
