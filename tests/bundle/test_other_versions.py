"""A bundle made here serves where neither torch nor this onnxruntime is: in an environment of its own, from PyPI."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import onnxruntime
import pytest

import moeca_compile as moeca
from moeca_compile.runtime.bundle.bundle import Bundle

SERVE = """
import importlib.util, json, sys
assert all(importlib.util.find_spec(name) is None for name in ("torch", "onnx", "openvino"))
import numpy as np, onnxruntime
from moeca_compile.runtime import Session
from moeca_compile.runtime.bundle.fused import FusedSession
from examples.samplers import euler, guided, model_of
from moeca_compile.runtime.bundle.verify import verify
found = {"version": onnxruntime.__version__}
for memory in ("speed", "shared"):
    session = Session.open(sys.argv[1], memory=memory, threads=1)
    found[memory] = verify(session).passed
found["fused"] = verify(FusedSession.open(sys.argv[1], threads=1)).passed
x = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
with session.trajectory() as trajectory:
    model = guided(model_of(trajectory), np.full(2, 10), 2.0)
    found["finite"] = bool(np.isfinite(euler(model, x, np.array([1, 2]), np.linspace(1, 0, 9), 1000.0)).all())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_serves_on_another_minor_version_without_torch(exported: Bundle, tmp_path: Path) -> None:
    major, minor = map(int, onnxruntime.__version__.split(".")[:2])
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", f"onnxruntime<{major}.{minor}", "msgspec", "numpy"]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, f"this test needs PyPI: {installed.stderr}"
    root = Path(moeca.__file__).parents[1]
    done = subprocess.run([python, "-c", SERVE, exported.path], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    other = tuple(map(int, found.pop("version").split(".")[:2]))
    assert other < (major, minor)
    assert found == {"speed": True, "shared": True, "fused": True, "finite": True}
