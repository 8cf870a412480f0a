"""Model repositories: what is in them, and what is refused with nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeca_compile.errors import BundleError, OptionError
from moeca_compile.runtime.bundle import Bundle
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton import write_repository
from moeca_compile.runtime.triton.pbtxt import loads
from moeca_compile.runtime.triton.repository import write_fused
from tests.bundle.triton.graphs import one_file


def test_a_repository(exported: Bundle, tmp_path: Path) -> None:
    (folder,) = write_repository(exported, tmp_path / "models", sequences=3, idle_seconds=5, threads=1)
    assert folder == tmp_path / "models" / "small"
    config = loads((folder / "config.pbtxt").read_text())
    assert config["name"] == "small"
    assert config["sequence_batching"]["oldest"] == {"max_candidate_sequences": 3}
    assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 5_000_000
    assert Session.open(folder / "1" / "bundle", threads=1).bundle.manifest.data == exported.manifest.data
    write_repository(exported, tmp_path / "models", "another")
    assert sorted(one.name for one in (tmp_path / "models").iterdir()) == ["another", "small"]


def one_file_bundle(exported: Bundle, graph: bytes, folder: Path) -> Bundle:
    """A hand-made graph in place of the bundle's: what counts here is that its signature becomes the config."""
    (folder / "fused.onnx").write_bytes(graph)
    return replace(exported, path=folder)


def test_one_file_with_state_for_onnxruntime(exported: Bundle, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    write_fused(one_file_bundle(exported, one_file(), copy), folder, batch=2, sequences=4, idle_seconds=60)
    config = loads((folder / "config.pbtxt").read_text())
    assert (config["name"], config["backend"]) == ("m", "onnxruntime")
    assert config["input"] == {"name": "x", "data_type": "TYPE_FP32", "dims": [2, 3]}
    assert [one["input_name"] for one in config["sequence_batching"]["state"]] == [
        "state_000_in", "state_001_in", "step_in",
    ]  # fmt: skip
    assert sorted(one.name for one in (folder / "1").iterdir()) == ["model.onnx", "weights.bin"]


def test_a_graph_that_cannot_be_served_leaves_nothing(exported: Bundle, copy: Path, tmp_path: Path) -> None:
    bundle = one_file_bundle(exported, one_file("width"), copy)
    with pytest.raises(BundleError, match="the size 'width'"):
        write_fused(bundle, tmp_path / "models" / "m", batch=2, sequences=4, idle_seconds=60)
    assert not (tmp_path / "models").exists()


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
