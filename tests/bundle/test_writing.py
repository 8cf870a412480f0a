"""Directories are whole or not there, whoever is killed or writes too; sessions outlive their files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeca_compile.errors import BundleError
from moeca_compile.runtime.writing import building, unfinished
from tests.bundle.conftest import EACH_PROVIDER


def child(*words: object, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


KILLED = """
import os, sys, signal
from pathlib import Path
from moeca_compile.runtime.writing import building
with building(Path(sys.argv[1])) as folder:
    (folder / "weights.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    assert child(tmp_path / "b", code=KILLED).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".b.")
    with building(tmp_path / "other"):  # it is none of its own
        assert left.exists()
    with building(tmp_path / "b") as folder:
        assert sorted(tmp_path.glob(".*")) == [folder]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b", "other"]


def test_two_at_once(tmp_path: Path) -> None:
    """Neither removes what the other is writing, and the later one is refused."""
    later = building(tmp_path / "b")
    second = later.__enter__()
    with building(tmp_path / "b") as first:
        (first / "x").touch()
        assert sorted(tmp_path.glob(".b.*")) == sorted([first, second])
    with pytest.raises(BundleError, match=r"can't be made: .*another process made it meanwhile"):
        later.__exit__(None, None, None)
    assert [one.name for one in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "x").exists()


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".b.1.unfinished").mkdir()
    with unfinished(tmp_path, "[b]"):
        assert (tmp_path / ".b.1.unfinished").exists()


def test_a_folder_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="can't write beside"), building(tmp_path / "file" / "b"):
        pass
    with pytest.raises(BundleError, match="can't write into"), unfinished(tmp_path / "nowhere", "b"):
        pass


SERVES = """
import os, sys
import numpy as np
from moeca_compile.runtime.session import Session
session = Session.open(sys.argv[1], sys.argv[2], threads=1)
call = session.bundle.golden()[0][0]
wanted = session.run(call)["output"]
weights = sys.argv[1] + "/weights.bin"
if sys.argv[3] == "replaced":
    with open(weights + ".new", "wb") as file:
        file.write(b"\\xff" * os.path.getsize(weights))
    os.replace(weights + ".new", weights)
else:
    with open(weights, "r+b") as file:
        if sys.argv[3] == "truncated":
            file.truncate(0)
        else:
            file.write(b"\\xff" * os.path.getsize(weights))
for _ in range(2):
    np.testing.assert_array_equal(session.run(call)["output"], wanted)
print("alive")
"""


@pytest.mark.parametrize("provider", EACH_PROVIDER)
@pytest.mark.parametrize("how", ["truncated", "overwritten", "replaced"])
def test_weights_that_change_under_a_session(copy: Path, provider: str, how: str) -> None:
    done = child(copy, provider, how, code=SERVES)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_the_lock_goes_with_the_directory(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in "abc":
        with building(tmp_path / name):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
