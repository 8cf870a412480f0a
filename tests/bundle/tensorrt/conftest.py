"""The small bundle: with engines that the fake runs, and lowered for TensorRT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.writing import entry_of, seal
from moeca_compile.schedule import Schedule
from tests.bundle.conftest import call_of, small_model
from tests.bundle.tensorrt.fake import entries


@pytest.fixture
def with_engines(copy: Path) -> Bundle:
    return put_engines(copy)


def put_engines(copy: Path) -> Bundle:
    """Put an engine for each variant into a bundle."""
    bundle = Bundle.open(copy)
    data = json.loads((copy / "manifest.json").read_text())
    data["engines"] = entries(bundle.manifest)
    for one in data["engines"]:
        plan = copy / one["file"]
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_bytes(one["variant"].encode())
        data["files"][one["file"]] = entry_of(plan)
    seal(copy, data)
    return Bundle.open(copy)


@pytest.fixture(scope="session")
def lowered(schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For TensorRT, with its engines where TensorRT-RTX is installed."""
    folder = tmp_path_factory.mktemp("lowered") / "small.moeca"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no engines were built", MoecaWarning)
        return moeca.export(small_model(), call_of(2), schedule, folder, targets=("tensorrt",))
