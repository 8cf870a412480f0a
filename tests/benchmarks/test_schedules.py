"""The schedules benchmark: its figures are the ones they claim to be, and its quick form writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import schedules


def test_the_second_order_solver_is_one() -> None:
    """dx/dt = x from t = 1 to 0 gives x/e: halving the step quarters the error of the second-order steps."""

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x

    def error(steps: int, second_order: bool) -> float:
        made = schedules.sampler(2, steps, second_order)(velocity, 3)
        start = schedules.digits.initial_noise(3, 2)
        return float((made - start * torch.exp(torch.tensor(-1.0))).abs().max())

    assert error(20, False) / error(40, False) == pytest.approx(2, rel=0.1)
    assert error(20, True) / error(40, True) == pytest.approx(4, rel=0.15)


def test_labels_go_round() -> None:
    seen = torch.cat([schedules.labels_of(seed, 4) for seed in range(5)])
    assert seen.tolist() == [*range(10), *range(10)]


def test_frechet_distance_is_none_to_itself_and_grows_with_noise() -> None:
    images = torch.rand(96, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = [schedules.distance(images, images + strength * torch.randn_like(images)) for strength in (0.3, 1.0)]
    assert schedules.distance(images, images) == pytest.approx(0, abs=1e-6)
    assert 1e-3 < noisy[0] < noisy[1]


def test_a_picture_is_drawn_from_the_committed_result(tmp_path: Path) -> None:
    schedules.main(["--picture", str(tmp_path / "pareto.svg")])
    assert "<svg" in (tmp_path / "pareto.svg").read_text()


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    schedules.main(["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    written = json.loads((tmp_path / "schedules.json").read_text())
    (budget,) = written["steps"]["10"]["budgets"].values()
    names = [line["name"] for line in budget["lines"]]
    assert names[-1] == "calibrated"
    assert len(names) == 6
    assert all(line["mac_fraction"] <= 0.51 for line in budget["lines"])
    assert all(line["psnr_db"] > 20 for line in budget["lines"])
    swept = written["steps"]["10"]["sweep"]
    assert {name: len(some) for name, some in swept.items()} == {
        f"every uniform, order-{order}": len(schedules.SWEEP) for order in range(3)
    }
    again = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path), "--again", "calibrated"]
    schedules.main(again)
    kept = json.loads((tmp_path / "schedules.json").read_text())
    assert kept["measured anew"] == ["calibrated"]
    assert kept["steps"] == written["steps"], "nothing changed in between"
