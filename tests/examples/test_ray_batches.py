"""Digits on a local Ray cluster: those of one process, none lost or doubled when a worker is killed, weights once."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeca_compile as moeca
from examples import digits
from moeca_compile.runtime import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
ray = pytest.importorskip("ray", reason="ray isn't installed: pip install 'moeca-compile[fleet]'")
fleet: Any = importlib.import_module("examples.08_ray_batches")
STEPS, SEEDS = 12, list(range(40))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else the machine's other work comes before the workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleet") / "digits.moeca"
    fleet.export(path)
    return path


@pytest.fixture(scope="module")
def alone(bundle: Path) -> dict[str, dict[int, Any]]:
    """What each seed gives by itself in this process, by the mode of the weights' memory."""
    samples: dict[str, dict[int, Any]] = {}
    for memory in ("shared", "speed"):
        session, samples[memory] = Session.open(bundle, memory=memory, threads=1), {}
        for seed in SEEDS:
            with session.trajectory(steps=STEPS) as trajectory:
                samples[memory][seed] = fleet.drive(fleet.digit(seed, STEPS), trajectory.run)
    return samples


def arguments(bundle: Path, **changed: Any) -> dict[str, Any]:
    return {"bundle": str(bundle), "steps": STEPS} | changed


def stored(folder: Path) -> dict[int, Any]:
    return {int(file.stem): np.load(file) for file in folder.glob("*.npy")}


def mapped(process: int) -> tuple[int, int]:
    """KiB of the weights' pages in a process: resident, and its share of them (PSS)."""
    text = Path(f"/proc/{process}/smaps").read_text()
    parts = [part for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text) if "weights.bin" in part.split("\n")[0]]
    return tuple(sum(int(re.search(rf"^{name}: +(\d+)", part, re.M)[1]) for part in parts) for name in ("Rss", "Pss"))  # type: ignore[return-value, index]


@pytest.mark.parametrize("memory", ["shared", "speed"])
def test_a_killed_worker_loses_and_doubles_nothing(
    cluster: None, bundle: Path, alone: dict[str, dict[int, Any]], memory: str, tmp_path: Path
) -> None:
    written, killed, later = [], 0, set()
    for drawn in fleet.generate(fleet.BundleWorker, arguments(bundle, memory=memory), SEEDS, tmp_path):
        written.append(drawn.seed)
        assert drawn.done == len(written)
        if not killed:
            killed = drawn.worker[1]
            os.kill(killed, signal.SIGKILL)
            time.sleep(1)
        else:
            later.add(drawn.worker[1])
    assert later - {killed}
    assert sorted(written) == SEEDS
    samples = stored(tmp_path)
    assert sorted(samples) == SEEDS
    for seed in SEEDS:
        assert samples[seed].tobytes() == alone[memory][seed][0].tobytes(), seed


def test_a_job_that_broke_off_draws_what_is_missing(cluster: None, bundle: Path, tmp_path: Path) -> None:
    job = fleet.generate(fleet.BundleWorker, arguments(bundle), SEEDS[:16], tmp_path)
    first = next(job).seed
    job.close()
    assert list(stored(tmp_path)) == [first]
    again = [drawn.seed for drawn in fleet.generate(fleet.BundleWorker, arguments(bundle), SEEDS[:16], tmp_path)]
    assert sorted([first, *again]) == SEEDS[:16]
    assert list(fleet.generate(fleet.BundleWorker, arguments(bundle), SEEDS[:16], tmp_path)) == []
    changed = fleet.generate(fleet.BundleWorker, arguments(bundle, steps=STEPS + 1), SEEDS[:17], tmp_path)
    with pytest.raises(RuntimeError, match=r"node \S+ differs from the job in .*: steps 13, not 12"):
        list(changed)


def test_a_worker_without_the_bundle(cluster: None, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.moeca"
    with pytest.raises(
        RuntimeError, match=rf"node \d+\.\d+\.\d+\.\d+ can't open the bundle '{missing}': .* is no directory"
    ):
        list(fleet.generate(fleet.BundleWorker, arguments(missing), SEEDS, tmp_path))
    assert list(stored(tmp_path)) == []


class Measured(fleet.BundleWorker):
    """Writes, when `workers` of them have drawn something, what share of the weights it has."""

    def __init__(self, meeting: str, workers: int, **given: Any) -> None:
        super().__init__(**given)
        self.file, self.workers = Path(meeting, str(os.getpid())), workers
        with Path(meeting, "opened").open("a") as opened:
            opened.write(f"{os.getpid()}\n")

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        answer, end = super().__call__(rows), time.monotonic() + 200
        if self.file.exists():  # the other worker may have ended since
            return answer
        self.file.touch()
        while len(list(self.file.parent.glob("[0-9]*"))) < self.workers and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        self.file.write_text(json.dumps(mapped(os.getpid())))
        time.sleep(0.5)
        return answer


def test_workers_open_once_and_share_the_pages_of_the_weights(cluster: None, bundle: Path, tmp_path: Path) -> None:
    shares = {}
    for workers in (1, 2):
        meeting = tmp_path / f"meeting{workers}"
        meeting.mkdir()
        given = arguments(bundle, meeting=str(meeting), workers=workers)
        assert len(list(fleet.generate(Measured, given, SEEDS[:24], tmp_path / str(workers), workers))) == 24
        files = list(meeting.glob("[0-9]*"))
        assert sorted(meeting.joinpath("opened").read_text().split()) == sorted(file.name for file in files)
        shares[workers] = [json.loads(file.read_text()) for file in files]
        assert len(files) == workers
    ((resident, one),), size = shares[1], (bundle / "weights.bin").stat().st_size / 1024
    assert 0.9 * size < one < 1.1 * size
    assert all(rss == pytest.approx(resident, rel=0.1) for rss, _ in shares[2])
    assert sum(pss for _, pss in shares[2]) == pytest.approx(one, rel=0.1)


def test_torch_models_on_workers(cluster: None, tmp_path: Path) -> None:
    model = moeca.compile(digits.load_model(), schedule="uniform:3", inner="eager")
    given = {"schedule": "uniform:3", "inner": "eager", "steps": STEPS}
    written = [drawn.seed for drawn in fleet.generate(fleet.TorchWorker, given, SEEDS[:9], tmp_path)]
    assert sorted(written) == SEEDS[:9]
    for seed, sample in stored(tmp_path).items():
        assert sample.tobytes() == fleet.torch_digit(model, seed, STEPS)[0].tobytes()
    assert "weights" in json.loads((tmp_path / fleet.JOB).read_text())
