"""Real bundles become engines: every variant parses and builds in TensorRT-RTX, without a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import moeca_compile as moeca
from benchmarks import models
from examples import digits
from moeca_compile.errors import MoecaWarning
from moeca_compile.lowering.tensorrt.build import EngineRequest
from moeca_compile.runtime.bundle.bundle import Bundle, engine_file
from moeca_compile.schedule import Action, Schedule

pytest.importorskip("tensorrt_rtx_bindings")

ONE = EngineRequest("tensorrt-rtx", ("sm_89",))


def three_rows(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Schedule:
    """All computed, attention alone, all forecast."""
    regions = moeca.explain(model, *inputs).regions
    rows = (
        tuple(Action.COMPUTE for _ in regions),
        tuple(Action.COMPUTE if region.kind == "attention" else Action.FORECAST for region in regions),
        tuple(Action.FORECAST for _ in regions),
    )
    return Schedule(rows, tuple(region.key for region in regions), order=1, period=3)


def check(bundle: Bundle) -> None:
    engines = bundle.manifest.engines
    assert len(engines) == len(bundle.manifest.variants) == 3
    assert all(len(engine_file(bundle.path, one, bundle.manifest)) > 100_000 for one in engines)


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    model = digits.load_model()
    inputs = digits.initial_noise(seed=0, n=2), torch.full((2,), 1000.0), digits.labels_of(2)
    schedule = three_rows(model, inputs)
    check(moeca.export(model, inputs, schedule, tmp_path / "b", targets=("tensorrt",), engines=ONE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_s2(tmp_path: Path) -> None:
    """DiT-MoE-S/2-8E2A, random weights, its one batch; a capacity instead of every expert on every token."""
    model, inputs = models.network(), models.example_inputs()
    schedule = three_rows(model, inputs)
    given = {"targets": ("tensorrt",), "engines": ONE, "experts": "capacity:4", "dynamic_batch": False}
    check(moeca.export(model, inputs, schedule, tmp_path / "b", **given))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Strongly typed: the graph's precision is the engine's. onnxruntime's CPU provider can't try bfloat16."""
    model = digits.load_model().to(dtype)
    inputs = digits.initial_noise(seed=0, n=2).to(dtype), torch.full((2,), 1000.0), digits.labels_of(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoecaWarning)
        bundle = moeca.export(model, inputs, "uniform:3", tmp_path / "b", targets=("tensorrt",), engines=ONE)
    assert bundle.manifest.dtype == str(dtype).removeprefix("torch.")
    assert len(bundle.manifest.engines) == len(bundle.manifest.variants)
