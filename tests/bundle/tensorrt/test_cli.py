"""`moeca engines`, `moeca triton`, and what `moeca export` does for both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moeca_compile import exporting
from moeca_compile.cli import bundles, deploy
from moeca_compile.errors import BundleError, OptionError
from moeca_compile.lowering.tensorrt.build import EngineRequest
from moeca_compile.runtime.bundle.bundle import Bundle


def run(*words: object) -> str:
    app = typer.Typer()
    bundles.mount(app)
    deploy.mount(app)
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done.stdout


def nothing() -> tuple[None, None]:
    return None, None


@pytest.mark.slow  # `make engines` runs it too
def test_engines(lowered: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    shutil.copytree(lowered.path, tmp_path / "b")
    said = run("engines", tmp_path / "b", "--arch", "sm_89", "--batches", "2,2,2").split("\n")
    assert sum(line.startswith("engines/sm_89-rtx") and line.endswith("batches 2 to 2") for line in said) == 4
    assert "engines/sm_89-rtx" in run("info", tmp_path / "b")
    (plan,) = (tmp_path / "b" / "engines").glob("sm_89-*/v0.plan")
    plan.write_bytes(b"")
    with pytest.raises(BundleError, match=r"v0\.plan has 0 bytes"):
        run("verify", tmp_path / "b")


@pytest.mark.parametrize("batches", ["1", "1,2", "a,b,c", "1,2,3,4"])
def test_batches_that_are_none(exported: Bundle, batches: str) -> None:
    with pytest.raises(OptionError, match="expected three numbers"):
        run("engines", exported.path, "--batches", batches)


def test_triton(exported: Bundle, tmp_path: Path) -> None:
    said = run("triton", exported.path, tmp_path / "models", "--name", "m", "--sequences", 3)
    models = tmp_path / "models"
    serve = f"next: tritonserver --model-repository={models}"
    assert said.splitlines() == [str(models / "m"), str(models / "m_fused"), serve]
    assert "max_candidate_sequences: 3" in (tmp_path / "models" / "m" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("words", "asked"), [((), None), (("--arch", "sm_89,sm_120"), EngineRequest(arch=("sm_89", "sm_120")))]
)
def test_export(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], asked: Any
) -> None:
    """What reaches the export, and what is printed of its bundle."""
    given: dict[str, Any] = {}

    def export(model: Any, inputs: Any, schedule: str, path: Path, **options: Any) -> Bundle:
        given.update(options)
        return exported

    monkeypatch.setattr(exporting, "export", export)
    where = "--triton", tmp_path / "models"
    run("export", f"{__name__}:nothing", tmp_path / "b", "--targets", "tensorrt", *where, *words)
    assert (given["targets"], given["engines"]) == (["tensorrt"], asked)
    assert (tmp_path / "models" / "small" / "1" / "bundle" / "manifest.json").exists()
