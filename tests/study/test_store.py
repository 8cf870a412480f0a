"""The folder that a calibration is kept in: what comes back, what is refused, what an interrupt leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.plan.drift import Drift, pairs_of
from moeca_compile.plan.rows import Plan
from moeca_compile.study.store import Store

WANTED = {"letters": "CF", "lookback": 3, "seeds": [0, 1]}


def drift() -> Drift:
    pairs = {pair: number for number, pair in enumerate(pairs_of(5, 3))}
    return Drift(5, pairs, ((0, 1),), np.ones((1, len(pairs), 2, 4), np.float32))


def test_everything_comes_back(tmp_path: Path) -> None:
    one = Store(tmp_path)
    one.keep_truth(7, torch.arange(6.0).reshape(2, 3), 1.5)
    one.keep_rollout(Plan("CFC", "order-2"), 7, [0.5, 0.25], 0.3)
    one.keep_drift(drift(), WANTED, {"seconds": 2.0})
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
    one.keep_drift(drift(), WANTED, {})
    assert one.drift({**WANTED, "lookback": 2}) is not None
    assert one.drift() is not None
    for other in ({"lookback": 4}, {"letters": "CFA"}, {"seeds": [1, 2]}):
        assert one.drift({**WANTED, **other}) is None


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    Store(tmp_path).keep_rollout(Plan("CF"), 0, [1.0], 0.1)
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
    one.keep_truth(0, torch.zeros(1), 1.0)
    one.keep_drift(drift(), WANTED, {})
    one.keep_rollout(Plan("CF"), 0, [1.0], 0.1)
    assert one.truth(0) is None
    assert one.drift(WANTED) is None
    assert (Plan("CF"), 0) in one.rollouts
