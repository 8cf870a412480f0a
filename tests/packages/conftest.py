"""One small model, saved once for all tests here: two variants are the least that a cache needs, 10 s of g++ each."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.engine.packages import program as loading
from moeca_compile.exporting.packages import programs as writing
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import lower_eager
from moeca_compile.options import Options
from tests.models import DiT
from tests.tools import UNHOISTED

SCHEDULE = "uniform:2"


def small_model() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=1, dim=16, heads=2, num_experts=4, top_k=2, hidden=12, size=4, channels=2).eval()


def call_at(step: int = 0, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y of one call of a trajectory with 8 steps."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(batch, 2, 4, 4, generator=generator), torch.full((batch,), 900.0 - step), torch.arange(batch)


@torch.no_grad()
def sample(model: Any, seed: int = 0, steps: int = 8) -> Tensor:
    """Euler steps of 3 samples."""
    x, _, y = call_at(seed)
    for step in range(steps):
        x = x - model(x, torch.full((3,), 1000.0 * (1 - step / steps)), y) / steps
    return x


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return moeca.compile(model, **{"schedule": SCHEDULE, "inner": "eager", "disable": UNHOISTED, **options})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs native code is slow: compiling the package takes half a minute. `.ci/run` runs these."""
    for item in items:
        if item.path.parent == Path(__file__).parent and "saved" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "small"
    moeca.save(compiled(small_model()), folder, *call_at())
    return folder


@pytest.fixture
def model(saved: Path) -> LoadedModel:
    return moeca.load(saved)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are run by torch, operator by operator, and no compiler is waited for; all else is as in a package."""
    programs: dict[str, Variant] = {}

    def lower_native(variant: Variant, args: Sequence[Any], options: Options, file: Path) -> None:
        programs[file.name] = variant
        file.write_bytes(b"interpreted")

    monkeypatch.setattr(writing, "lower_native", lower_native)
    monkeypatch.setattr(loading, "native_code", lambda file: lower_eager(programs[file.name]))
