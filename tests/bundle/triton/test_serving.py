"""A real Triton server on this machine's CPU: interleaved sequences give what a session gives.

The server and its client live in `.venv-triton`, which `make test-slow` makes (numpy 1, another protobuf).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.triton import write_repository
from tests.bundle.conftest import call_of, named

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("MOECA_TRITON_PYTHON", ROOT / ".venv-triton" / "bin" / "python"))
STARTS = 60  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-triton: `make test-slow` makes it"),
]


@contextmanager
def serving(repository: Path, folder: Path) -> Iterator[str]:
    """A server at a free port of the loopback; its address."""
    site = Path(asked("import sysconfig; print(sysconfig.get_path('purelib'))"))
    distribution = site / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(distribution / "backends", backends)
    stub = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(distribution / "python_backend_stubs" / stub / "triton_python_backend_stub", backends / "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    libraries = asked("import sysconfig; print(sysconfig.get_config_var('LIBDIR'))")
    environment = {
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{libraries}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        distribution / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
        "--exit-timeout-secs=5",
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(server, f"http://127.0.0.1:{port}/v2/health/ready", folder / "server.log")
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def asked(code: str) -> str:
    return subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"the server didn't start:\n{log.read_text()[-3000:]}")


def test_interleaved_sequences_equal_a_session(exported: Bundle, tmp_path: Path) -> None:
    """Three sequences of different lengths and batches, step by step in turn."""
    lengths = {1: (9, 2), 2: (6, 1), 3: (9, 3)}  # steps, batch
    calls = {
        number: [named(call_of(batch, seed=50 * number + step)) for step in range(steps)]
        for number, (steps, batch) in lengths.items()
    }
    given: dict[str, Any] = {
        f"{number}:{name}": np.stack([one[name] for one in steps]) for number, steps in calls.items() for name in "xty"
    }
    session = Session.open(exported.path, threads=1)
    np.savez(tmp_path / "steps.npz", **given)
    model, fused = write_repository(exported, tmp_path / "models", threads=1)
    shutil.move(fused, tmp_path / "fused")  # its backend isn't there
    script = Path(__file__).with_name("drive.py")
    with serving(tmp_path / "models", tmp_path) as url:
        configs = model / "config.pbtxt", tmp_path / "fused" / "config.pbtxt"
        command = [PYTHON, script, url, model.name, tmp_path / "steps.npz", tmp_path / "outputs.npz", *configs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()[-3000:]
    with np.load(tmp_path / "outputs.npz") as outputs:
        for number, steps in calls.items():
            with session.trajectory() as trajectory:
                for step, call in enumerate(steps):
                    np.testing.assert_allclose(
                        outputs[str(number)][step], trajectory.run(call)["output"], rtol=1e-5, atol=1e-6
                    )
    said = json.loads(done.stdout)
    assert "must specify the START flag" in said["never started"]
    assert "unexpected shape for input 'x'" in said["channels"]
    assert "input t has shape [2], the model takes t: float32 [batch]" in said["batch"]


def test_sequences_share_calls_bit_for_bit(exported: Bundle, tmp_path: Path) -> None:
    """Six sequences of 1 to 3 samples, sent by six threads from random moments on."""
    calls = {
        number: [named(call_of(1 + number % 3, seed=50 * number + step)) for step in range(12)]
        for number in range(1, 7)
    }
    given: dict[str, Any] = {
        f"{number}:{name}": np.stack([one[name] for one in steps]) for number, steps in calls.items() for name in "xty"
    }
    session = Session.open(exported.path, threads=1)
    np.savez(tmp_path / "steps.npz", **given)
    model, fused = write_repository(exported, tmp_path / "models", threads=1, max_batch=6, budget=2**24)
    shutil.move(fused, tmp_path / "fused")  # its backend isn't there
    script = Path(__file__).with_name("drive_shared.py")
    with serving(tmp_path / "models", tmp_path) as url:
        command = [PYTHON, script, url, model.name, tmp_path / "steps.npz", tmp_path / "outputs.npz"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with urllib.request.urlopen(f"http://{url}/v2/models/{model.name}/stats", timeout=5) as answer:
            (stats,) = json.load(answer)["model_stats"]
    assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()[-3000:]
    with np.load(tmp_path / "outputs.npz") as outputs:
        for number, steps in calls.items():
            with session.trajectory() as trajectory:
                expected = np.stack([trajectory.run(call)["output"] for call in steps])
            assert outputs[str(number)].tobytes() == expected.tobytes()
    assert stats["inference_count"] == 6 * 12
    assert stats["execution_count"] < 6 * 12  # several requests were handed over at once
