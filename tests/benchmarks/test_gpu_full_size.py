"""`python -m benchmarks.gpu_full_size`: contenders compute as many steps in full; its quick form runs all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_full_size
from moeca_compile.schedule import Action, Schedule


def test_the_steps_of_the_peers_are_the_schedules() -> None:
    size = gpu_full_size
    schedule = Schedule.parse(f"uniform:{size.INTERVAL}:warmup={size.WARMUP}").bind(("a",), "", "region")
    rows = [schedule.rows[schedule.row_index(step) or 0] for step in range(size.STEPS)]
    assert size.computed_steps() == [step for step, row in enumerate(rows) if row == (Action.COMPUTE,)]


def test_copies_share_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    copy = gpu_full_size.shared(model)
    assert copy is not model
    assert all(
        a is b
        for a, b in zip(
            model.state_dict(keep_vars=True).values(), copy.state_dict(keep_vars=True).values(), strict=True
        )
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_full_size.main([])
    assert "there is no GPU here; --quick runs a narrow model on the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    gpu_full_size.main(["--quick", "--out", str(tmp_path)])
    (run,) = json.loads((tmp_path / "gpu_full_size.json").read_text())["models"].values()
    figures = run["contenders"]
    assert not [name for name, one in figures.items() if "failed" in one]
    assert {one["computed"] for name, one in figures.items()} == {gpu_full_size.STEPS, 6}
    assert all(one["finite"] for one in figures.values())
    assert figures["moeca, regions"]["state_bytes"] > 0
