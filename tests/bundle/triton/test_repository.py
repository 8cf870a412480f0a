"""Model repositories: what is in them, and what is refused with nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.manifest import EngineSpec, FileSpec
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton import write_repository
from tests.bundle.conftest import call_of, named
from tests.bundle.triton.model_config import parse


def test_a_repository(exported: Bundle, tmp_path: Path) -> None:
    folder, _ = write_repository(exported, tmp_path / "models", sequences=3, idle_seconds=5, threads=1)
    assert folder == tmp_path / "models" / "small"
    config = parse((folder / "config.pbtxt").read_text())
    assert config["name"] == "small"
    assert config["sequence_batching"]["oldest"] == {"max_candidate_sequences": 3}
    assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 5_000_000
    assert Session.open(folder / "1" / "bundle", threads=1).bundle.manifest == exported.manifest
    write_repository(exported, tmp_path / "models", "another")
    models = sorted(one.name for one in (tmp_path / "models").iterdir())
    assert models == ["another", "another_fused", "small", "small_fused"]


def test_the_fused_graph_runs_by_its_config_alone(exported: Bundle, tmp_path: Path) -> None:
    """What Triton does with implicit state, played with onnxruntime: twice, for the state begins as zeros each time."""
    _, folder = write_repository(exported, tmp_path / "models", "m", batch=2)
    assert sorted(one.name for one in (folder / "1").iterdir()) == ["model.onnx", "weights.bin"]
    config = parse((folder / "config.pbtxt").read_text())
    assert (config["name"], config["backend"]) == ("m_fused", "onnxruntime")
    assert "max_batch_size" not in config  # 0, and so the batch is a dimension like others
    backend = onnxruntime.InferenceSession(folder / "1" / config["default_model_filename"])
    states = config["sequence_batching"]["state"]
    reference = Session.open(exported.path, threads=1)
    for _ in range(2):
        kept = {one["input_name"]: zeros(one["initial_state"][0]) for one in states}
        with reference.trajectory() as trajectory:
            for step in range(9):
                call = named(call_of(2, seed=step))
                assert all(list(call[one["name"]].shape) == one["dims"] for one in config["input"])
                found = dict(zip((o.name for o in backend.get_outputs()), backend.run(None, call | kept), strict=True))
                kept = {one["input_name"]: found[one["output_name"]] for one in states}
                wanted = trajectory.run(call)["output"]
                np.testing.assert_allclose(found["output"], wanted, rtol=1e-4, atol=1e-5)


def zeros(config: dict[str, Any]) -> Any:
    return np.zeros(config["dims"], {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}[config["data_type"]])


def test_engines_come_along_for_tensorrt_only(exported: Bundle, tmp_path: Path) -> None:
    engines = (EngineSpec("v0", "engines/a/v0.plan", "tensorrt", "1", ("sm_90",), None),)
    files = {**exported.manifest.files, "engines/a/v0.plan": FileSpec("0" * 64, 1)}
    bundle = replace(exported, manifest=msgspec.structs.replace(exported.manifest, engines=engines, files=files))
    write_repository(bundle, tmp_path / "models")
    with pytest.raises(BundleError, match=r"can't copy the bundle: .*v0\.plan"):
        write_repository(bundle, tmp_path / "others", provider="tensorrt")


def test_what_is_there_stays(exported: Bundle, tmp_path: Path) -> None:
    write_repository(exported, tmp_path)
    with pytest.raises(BundleError, match="exists already"):
        write_repository(exported, tmp_path)


def test_not_into_the_bundle(copy: Path) -> None:
    bundle = Bundle.open(copy)
    with pytest.raises(BundleError, match="is in the bundle"):
        write_repository(bundle, copy / "triton")
    assert not (copy / "triton").exists()


def test_a_bundle_that_was_changed_since_it_was_opened(copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(copy)
    raw = (copy / "weights.bin").read_bytes()
    (copy / "weights.bin").write_bytes(raw[:-1] + b"!")
    with pytest.raises(BundleError, match=r"weights\.bin isn't what was exported"):
        write_repository(bundle, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "a b", "a\n"])
def test_names_that_are_none(exported: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="expected letters"):
        write_repository(exported, tmp_path, name)


@pytest.mark.parametrize("number", ["batch", "sequences", "idle_seconds", "threads"])
def test_numbers_that_are_too_small(exported: Bundle, tmp_path: Path, number: str) -> None:
    given: Any = {number: -1}
    with pytest.raises(OptionError, match=number):
        write_repository(exported, tmp_path, **given)
