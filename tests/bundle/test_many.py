"""Many trajectories of one session at a time, and many sessions one after another."""

from __future__ import annotations

import gc
import random
import resource
from pathlib import Path

import pytest

import moeca_compile as moeca
from moeca_compile.runtime.bundle.bundle import Bundle
from moeca_compile.runtime.session import Session
from tests.bundle.conftest import call_of, named, small_model

TRAJECTORIES, STEPS = 64, 4
SESSIONS, WARM_UP = 40, 10
MAX_GROWTH = 4 * 2**20  # bytes; a session holds more than a tenth of that, so 40 leaked ones would be seen


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With prologues and state."""
    path = tmp_path_factory.mktemp("many") / "b"
    return moeca.export(small_model(), call_of(1), "uniform:2", path, dynamic_batch=False)


@pytest.mark.slow
def test_trajectories_interleaved(bundle: Bundle) -> None:
    """In an order by dice; each gives bit for bit what it gives alone."""
    session = Session.open(bundle.path, threads=1)
    alone = []
    for seed in range(TRAJECTORIES):
        with session.trajectory() as trajectory:
            alone.append([result(trajectory, seed, step) for step in range(STEPS)])
    turns = [seed for seed in range(TRAJECTORIES) for _ in range(STEPS)]
    random.Random(0).shuffle(turns)
    together = [session.trajectory() for _ in range(TRAJECTORIES)]
    found: list[list[bytes]] = [[] for _ in range(TRAJECTORIES)]
    for seed in turns:
        found[seed].append(result(together[seed], seed, len(found[seed])))
    assert found == alone


def result(trajectory: object, seed: int, step: int) -> bytes:
    x, t, y = call_of(1, seed=seed)
    array = trajectory.run(named((x * (1 - step / 10), t - step, y)))["output"]  # type: ignore[attr-defined]
    return bytes(array.tobytes())


@pytest.mark.slow
def test_sessions_leave_nothing(bundle: Bundle) -> None:
    sizes = []
    for number in range(WARM_UP + SESSIONS):
        with Session.open(bundle.path, threads=1).trajectory() as trajectory:
            result(trajectory, 0, 0)
        if number in (WARM_UP - 1, WARM_UP + SESSIONS - 1):
            gc.collect()
            sizes.append(resident())
    assert sizes[1] - sizes[0] < MAX_GROWTH


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
