"""The other ways to a package and around one: `export`, the command line, and the functions for compiled models."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moeca_compile as moeca
from moeca_compile import cli
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.errors import BundleError, MoecaWarning, OptionError, StateError
from moeca_compile.runtime import Session
from moeca_compile.runtime.packages.package import Package
from tests.packages.conftest import SCHEDULE, call_at, sample, small_model


@pytest.mark.usefixtures("interpreted")
@pytest.mark.slow
def test_export_makes_a_package(tmp_path: Path) -> None:
    package = moeca.export(
        small_model(), call_at(), SCHEDULE, tmp_path / "p", targets="aoti", dynamic_batch=False,
        other_sizes=[call_at(batch=2)],
    )  # fmt: skip
    assert isinstance(package, Package)
    assert len(package.manifest.sizes) == 2
    assert sample(moeca.load(tmp_path / "p")).shape == (3, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": ["aoti", "onnx"]}, "makes a package and no bundle"),
        ({"targets": "aoti", "dynamic_batch": True}, "a package is for the batches of its examples"),
        ({"targets": "aoti", "fused": True, "opset": 18}, "fused, opset: for bundles alone"),
    ],
)
def test_what_export_refuses_beside_it(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        moeca.export(small_model(), call_at(), SCHEDULE, tmp_path / "p", **{"dynamic_batch": False, **options})


def built() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return small_model(), call_at()


@pytest.mark.usefixtures("interpreted")
def test_the_command_exports_and_shows_it(tmp_path: Path) -> None:
    source, folder = f"{__name__}:built", str(tmp_path / "p")
    command = ["export", source, folder, "--schedule", SCHEDULE, "--targets", "aoti"]
    result = CliRunner().invoke(cli.app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["variants"] == 2
    shown = CliRunner().invoke(cli.app, ["info", folder])
    assert f"torch {torch.__version__}" in shown.output
    assert json.loads(CliRunner().invoke(cli.app, ["info", folder, "--json"]).stdout)["format"] == "moeca-package"


def test_a_session_names_what_opens_it(saved: Path) -> None:
    with pytest.raises(BundleError, match=r"moeca_compile\.load opens it"):
        Session.open(saved)


def test_functions_of_compiled_models_take_it(model: LoadedModel) -> None:
    pipe = types.SimpleNamespace(transformer=model)
    with moeca.trajectory(pipe, steps=8):
        sample(pipe.transformer)
    assert len(moeca.stats(pipe).steps) == len(moeca.stats(model).steps) == 8
    moeca.reset(pipe)
    assert not model.stats().steps
    with pytest.warns(MoecaWarning, match="no call of the compiled model came"), moeca.trajectory(model):
        pass


@pytest.mark.parametrize(
    "function",
    [
        moeca.compile, moeca.prepare, moeca.disable, moeca.explain, moeca.warmup,
        lambda model: moeca.save(model, "nowhere", *call_at()),
        lambda model: moeca.export(model, call_at(), SCHEDULE, "nowhere"),
        lambda model: moeca.trajectory(model, frozen=True),
    ],
)  # fmt: skip
def test_what_needs_the_model_itself_says_so(model: LoadedModel, function: Callable[[Any], Any]) -> None:
    with pytest.raises(StateError, match="LoadedModel is native code out of a package"):
        function(model)
