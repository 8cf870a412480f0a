"""The folder that a calibration is kept in: what comes back, what is refused, what an interrupt leaves behind."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.drift.stale import PerturbationResult
from moeca_compile.planner.origin import is_same, origin_of
from moeca_compile.planner.search.drift import Drift, pairs_of
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.store import Store

WANTED = {"letters": "CF", "lookback": 3, "seeds": [0, 1]}


def drift() -> Drift:
    pairs = {pair: number for number, pair in enumerate(pairs_of(5, 3))}
    return Drift(5, pairs, ((0, 1),), np.ones((1, len(pairs), 2, 4), np.float32))


def test_everything_comes_back(tmp_path: Path) -> None:
    one = Store(tmp_path)
    one.add_truth(7, torch.arange(6.0).reshape(2, 3), 1.5)
    one.add_rollout(Plan("CFC", "order-2"), 7, [0.5, 0.25], 0.3)
    one.add_drift(drift(), WANTED, {"seconds": 2.0})
    other = Store(tmp_path)
    truth = other.truth(7)
    assert truth is not None
    assert torch.equal(truth, torch.arange(6.0).reshape(2, 3))
    assert other.truth(8) is None
    assert other.seconds == [1.5]
    assert other.rollouts == {(Plan("CFC", "order-2"), 7): ((0.5, 0.25), 0.3)}
    kept = other.drift(WANTED)
    assert kept is not None
    assert kept[0].pairs == drift().pairs
    assert kept[0].atoms == ((0, 1),)
    assert np.array_equal(kept[0].parts, drift().parts)
    assert kept[1] == {"seconds": 2.0}


def test_a_drift_serves_what_it_covers(tmp_path: Path) -> None:
    one = Store(tmp_path)
    assert one.drift(WANTED) is None
    one.add_drift(drift(), WANTED, {})
    assert one.drift({**WANTED, "lookback": 2}) is not None
    assert one.drift() is not None
    for other in ({"lookback": 4}, {"letters": "CFA"}, {"seeds": [1, 2]}):
        assert one.drift({**WANTED, **other}) is None


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    Store(tmp_path).add_rollout(Plan("CF"), 0, [1.0], 0.1)
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"plan": "CF", "predi')
    assert list(Store(tmp_path).rollouts) == [(Plan("CF"), 0)]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    facts = {"graph": "abc", "steps": 5, "timesteps": [1.0, 0.5]}
    Store(tmp_path).check(facts)
    Store(tmp_path).check(facts)
    with pytest.raises(ScheduleError, match="steps is 5 there, 6 here"):
        Store(tmp_path).check({**facts, "steps": 6})


def test_without_a_folder_nothing_is_written() -> None:
    one = Store()
    one.check({"graph": "abc"})
    one.add_truth(0, torch.zeros(1), 1.0)
    one.add_drift(drift(), WANTED, {})
    one.add_rollout(Plan("CF"), 0, [1.0], 0.1)
    assert one.truth(0) is None
    assert one.drift(WANTED) is None
    assert (Plan("CF"), 0) in one.rollouts


def kept(path: Path) -> None:
    """A folder with everything in it."""
    one = Store(path)
    one.check({"graph": "abc"})
    one.add_origin(7, ((1.0, 0.5, -0.25), (3.0,)))
    one.add_truth(7, torch.ones(2, 3), 1.5)
    one.add_rollout(Plan("CFC", "order-2"), 7, [0.5, 0.25], 0.3)
    one.add_drift(drift(), WANTED, {"seconds": 2.0})
    one.add_perturbation(PerturbationResult("blocks.0.moe", 0, 3, 7, 41.5))


def read(path: Path) -> Store:
    """All that a calibration reads of a folder."""
    one = Store(path)
    one.check({"graph": "abc"})
    one.truth(7)
    one.drift(WANTED)
    one.perturbations()
    return one


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([value], object), allow_pickle=True)
    return file.getvalue()


def saved(*values: float) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


ROLLOUT = {"plan": "CF", "predictor": "order-1", "seed": 0, "mse": [0.5], "seconds": 0.1}
BYTES = [
    b"",
    b"\x93NUMPY\x01",
    b"PK\x03\x04",
    b"\xff\xfe\x00",
    b"[]",
    b"5",
    b"null",
    b'{"seconds": null}',
    b"[" * 100_000,
]
LINES = [
    ROLLOUT | change
    for change in (
        {"mse": [float("nan")]}, {"mse": []}, {"mse": [-1.0]}, {"mse": 0.5}, {"seconds": None}, {"seed": "0"},
        {"plan": ["C"]}, {"predictor": "order-9"}, {"seed": 10**400, "mse": [10**400]},
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, raw) for name in ("facts.json", "truth/7.npy", "drift.npz") for raw in BYTES),
        *((f"{name}.jsonl", raw) for name in ("truth", "rollouts", "origins", "experts") for raw in BYTES[3:]),
        *(("rollouts.jsonl", json.dumps(line).encode()) for line in LINES),
        ("truth/7.npy", pickled("x")), ("truth/7.npy", saved(1.0, float("nan"))),
        ("experts.jsonl", b'{"region": "a", "layer": 0}'), ("origins.jsonl", b'{"seed": 0, "inputs": [1]}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    kept(tmp_path)
    assert read(tmp_path).origins == {7: ((1.0, 0.5, -0.25), (3.0,))}
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScheduleError, match="is damaged") as error:
        read(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "Delete" in str(error.value)


def test_origins_are_alike_but_for_rounding() -> None:
    x, labels, mask = torch.randn(2, 4, 8), torch.tensor([1, 2]), torch.tensor([0.0, -math.inf])
    one = origin_of((x, labels, mask, 3, None, True))
    assert is_same(one, origin_of((x * (1 + 1e-5), labels, mask, 3, None, True)))
    assert is_same(one, json.loads(json.dumps(one)))
    for other in ((x * 1.1, labels, mask), (x.flip(0), labels, mask), (x, labels.flip(0), mask), (x, labels, mask * 0)):
        assert not is_same(one, origin_of((*other, 3, None, True)))
    assert not is_same(one, origin_of((x, labels, mask, 4, None, True)))
    assert not is_same(one, origin_of((x, labels, mask)))


def test_rollouts_of_predictors_that_no_schedule_runs_any_more_are_left_out(tmp_path: Path) -> None:
    kept(tmp_path)
    before = Store(tmp_path).rollouts.keys()
    for name in ("damped-bend", "order-1"):
        with (tmp_path / "rollouts.jsonl").open("a") as file:
            file.write(json.dumps(ROLLOUT | {"plan": "CFFF", "predictor": name}) + "\n")
    added = Store(tmp_path).rollouts.keys() - before
    assert {plan.predictor for plan, _ in added} == {"order-1"}
