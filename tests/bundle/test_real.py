"""Real model code as bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeca_compile as moeca
from moeca_compile.runtime.bundle.verify import verify
from moeca_compile.runtime.session import Session
from tests.real.zoo import ZOO

FIXED = {"HiDreamImage"}  # it loops over its samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of diffusers
]


@pytest.mark.parametrize("name", ["HiDreamImage", "DiT", "PixArt", "SD3", "Flux", "Wan", "NucleusMoEImage"])
def test_it_equals_torch_at_its_batches(name: str, tmp_path: Path) -> None:
    model = ZOO[name]
    bundle = moeca.export(model.build(), model.inputs(0), "uniform:2", tmp_path / "b", dynamic_batch=name not in FIXED)
    assert {one.name for one in bundle.manifest.inputs} <= set(model.inputs(0))
    assert [one.name for one in bundle.manifest.outputs] == ["sample"]
    assert bundle.manifest.timestep == model.timestep
    assert verify(Session.open(bundle.path, threads=1)).passed
