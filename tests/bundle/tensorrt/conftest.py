"""The small bundle with engines that the fake runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeca_compile.runtime.bundle import Bundle
from moeca_compile.runtime.writing import entry_of, seal
from tests.bundle.tensorrt.fake import entries


@pytest.fixture
def with_engines(copy: Path) -> Bundle:
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
