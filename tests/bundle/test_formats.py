"""The format by itself: older versions open, and reading a bundle needs neither torch nor a runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeca_compile as moeca
from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.verify import relative_error, verify
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import PROVIDERS, edit_manifest, named
from tests.bundle.test_bad_bundles import seal
from tests.models import DiT

FORMATS = Path(__file__).parent / "formats"
STEPS = 12


@pytest.mark.parametrize("provider", PROVIDERS)
def test_version_2(provider: str) -> None:
    """A bundle that was written when the format had version 2: forecasts of order 2, which its graphs made of
    differences. Its golden steps are torch's of then."""
    session = Session.open(FORMATS / "version_2", provider, threads=1)
    assert session.manifest.version == 2
    assert session.schedule.order == 2
    verdict = verify(session)
    assert verdict.passed, verdict
    assert set(verdict.variants) == {"v0", "v1"}


def test_version_2_forecasts_as_torch_does() -> None:
    """Over enough steps for a quadratic through three outputs that differ."""
    torch.manual_seed(0)
    model = DiT("numpy", depth=1, dim=8, hidden=8, heads=2, size=4, channels=2, num_experts=2, top_k=1).eval()
    session = Session.open(FORMATS / "version_2", threads=1)
    compiled = moeca.compile(model.requires_grad_(False), schedule="uniform:4", order=2, inner="eager")
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(2, 2, 4, 4, generator=generator), torch.tensor([1, 2])
    with session.trajectory() as trajectory, moeca.trajectory(compiled):
        for step in range(STEPS):
            call = x * (1 - step / 20), torch.full((2,), 500.0 - 10 * step), labels
            result = trajectory.run(named(call))["output"]
            assert relative_error(result, compiled(*call).numpy()) < 1e-5
        assert [record.variant for record in trajectory.records].count("v1") > STEPS // 2


def test_version_2_takes_no_other_weights(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no parameters\.json"):
        Bundle.open(FORMATS / "version_2").with_weights({}, tmp_path / "b")


def test_today_s_graphs_are_not_read_as_version_2(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(version=2))
    with pytest.raises(BundleError, match=r"coefficients is float32 \[2, 4\], the manifest says .*\[2, 2\]"):
        Session.open(copy)


READS = """
import json, sys
blocked = ("torch", "onnxruntime", "openvino", "onnx", "tensorrt", "safetensors")
for name in blocked:
    sys.modules[name] = None
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.bundle.refit.parameters import ParameterTable
bundle = Bundle.open(sys.argv[1])
print(bundle)
bundle.golden()
ParameterTable.read(bundle.path, bundle.manifest.files)
ours = sorted(name for name in sys.modules if name.startswith("moeca_compile.runtime."))
print(json.dumps(ours))
"""
# what the format is made of, in the room of the runtimes
OF_THE_FORMAT = ("moeca_compile.runtime.bundle", "moeca_compile.runtime.reading")
NEEDS_SESSIONS = ("verify", "bench", "fused", "refit.exchange", "refit.golden")


def test_reading_a_bundle_needs_no_runtime(exported: Bundle) -> None:
    command = [sys.executable, "-c", READS, str(exported.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    assert "\n".join(text) == str(exported)
    loaded = json.loads(last)
    assert all(name.startswith(OF_THE_FORMAT) for name in loaded), loaded
    assert not {f"moeca_compile.runtime.bundle.{name}" for name in NEEDS_SESSIONS} & set(loaded)


def test_a_bundle_holds_the_quality_of_its_schedule(exported: Bundle, tmp_path: Path) -> None:
    """What the schedule's maker measured stays with the schedule, and is shown."""
    assert exported.schedule.predicted == {}
    assert "predicted" not in str(exported)
    folder = shutil.copytree(exported.path, tmp_path / "b")
    data = json.loads((folder / "schedule.json").read_text())
    (folder / "schedule.json").write_text(json.dumps(data | {"predicted": {"psnr_db": 41.25, "psnr_db_holdout": 40.5}}))
    seal(folder)
    assert "PSNR 41.2 dB, 40.5 dB for seeds that its search didn't see" in str(Bundle.open(folder))
