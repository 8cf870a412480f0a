"""The bundle commands: what they print, and their exit status."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from moeca_compile.cli import bundles
from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.summary import facts
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import PROVIDERS, call_of, edit_manifest, named, small_model


def run(*words: object) -> tuple[int, str]:
    app = typer.Typer()
    bundles.mount(app)
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def tiny() -> tuple[torch.nn.Module, Any, Any]:
    return small_model(), call_of(2), call_of(1)


def test_export(tmp_path: Path) -> None:
    source = f"{__name__}:tiny" if __name__.startswith("tests.") else "tests.bundle.test_cli:tiny"
    status, said = run("export", source, tmp_path / "b", "--schedule", "full", "--fixed-batch")
    assert status == 0
    assert "1 variants" in said
    assert run("verify", tmp_path / "b")[0] == 0
    status, said = run("info", tmp_path / "b")
    assert status == 0
    assert re.search(r"other sizes +x: float32 \[1, 4, 8, 8\]", said)


@pytest.mark.parametrize("source", ["nothing", "no.such.module:f", "tests.bundle.test_cli:none", "math:sqrt2"])
def test_export_of_what_cannot_be_loaded(source: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        run("export", source, tmp_path / "b")


def none() -> None:
    return None


def test_verify(exported: Bundle, copy: Path) -> None:
    status, said = run("verify", exported.path, "--threads", 1)
    assert status == 0
    assert said.startswith("as recorded")
    status, said = run("verify", exported.path, "--memory", "shared", "--json")
    assert json.loads(said)["passed"]
    for provider in PROVIDERS:
        status, said = run("verify", exported.path, "--fused", "--provider", provider)
        assert status == 0
        assert f"on {provider}, variants fused" in said
    edit_manifest(copy, lambda data: data["golden"].update(tolerance=0))
    assert run("verify", copy)[0] == 1
    (copy / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError):
        run("verify", copy)


def test_info(exported: Bundle) -> None:
    status, said = run("info", exported.path)
    assert status == 0
    assert "x: float32 [batch, 4, 8, 8]" in said
    assert "onnxruntime 1" in said
    assert "also fused.onnx" in said
    assert json.loads(run("info", exported.path, "--json")[1])["opset"] == 20


def test_what_the_schedule_s_maker_measured_is_shown(exported: Bundle) -> None:
    assert "predicted" not in facts(exported)
    predicted = {"psnr_db": 54.99, "psnr_db_holdout": 54.74, "mac_fraction": 0.34}
    calibrated = replace(exported, schedule=replace(exported.schedule, predicted=predicted))
    assert facts(calibrated)["predicted"] == "PSNR 55.0 dB, 54.7 dB for seeds that its search didn't see"


def test_refit(copy: Path, tmp_path: Path) -> None:
    """Of a copy: the new bundle is a second name of its weights, and onnx refuses such files."""
    name = next(one for one in small_model().state_dict() if one.endswith("bias"))
    bias = np.full(tuple(small_model().state_dict()[name].shape), 0.5, np.float32)
    save_file({name: bias}, tmp_path / "w.safetensors")
    status, said = run("refit", copy, tmp_path / "w.safetensors", tmp_path / "b", "--json")
    assert status == 0
    found = json.loads(said)
    assert (found["bundle"], found["changed_bytes"]) == (str(tmp_path / "b"), bias.nbytes)
    assert run("verify", tmp_path / "b")[0] == 0
    with pytest.raises(BundleError, match="exists"):
        run("refit", copy, tmp_path / "w.safetensors", tmp_path / "b")
    with pytest.raises(BundleError, match="is no readable safetensors file"):
        run("refit", copy, tmp_path / "none.safetensors", tmp_path / "c")
    save_file({"nothing": bias}, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match="nothing"):
        run("refit", copy, tmp_path / "w.safetensors", tmp_path / "c")


def test_run(exported: Bundle, session: Session, tmp_path: Path) -> None:
    calls = [named(call_of(2, seed=step)) for step in range(5)]
    np.savez(tmp_path / "in.npz", **{name: np.stack([one[name] for one in calls]) for name in "xty"})
    status, said = run("run", exported.path, "--inputs", tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    assert status == 0
    assert said.startswith("5 calls")
    with session.trajectory() as trajectory, np.load(tmp_path / "out.npz") as found:
        for step, call in enumerate(calls):
            np.testing.assert_allclose(found["output"][step], trajectory.run(call)["output"], rtol=1e-4, atol=1e-5)


def test_run_with_unequal_steps(exported: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros(3), t=np.zeros(2))
    with pytest.raises(BundleError, match="same number of steps"):
        run("run", exported.path, "--inputs", tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    with pytest.raises(BundleError, match="can't be read"):
        run("run", exported.path, "--inputs", tmp_path / "none.npz", "--out", tmp_path / "out.npz")


def test_bench(exported: Bundle) -> None:
    status, said = run(
        "bench", exported.path, "--providers", ",".join(PROVIDERS), "--steps", 8, "--rounds", 1, "--json"
    )
    assert status == 0
    figures, other = json.loads(said)
    assert [figures["provider"], other["provider"]] == list(PROVIDERS)
    assert set(figures["variant_ms"]) <= {one.name for one in exported.manifest.variants}
    assert figures["speedup"] == pytest.approx(figures["full_ms"] / figures["cached_ms"])
    assert 0 < figures["mac_fraction"] < 1
    assert "of the MACs" in run("bench", exported.path, "--steps", 4, "--rounds", 1)[1]
