"""Shards of a calibration: each samples its part, one folder holds all, and the schedule is that of one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import moeca_compile as moeca
from moeca_compile import cli
from moeca_compile.errors import OptionError, ScheduleError
from moeca_compile.planner.store import Store
from moeca_compile.schedule.output import GIVEN
from tests import ranks
from tests.planner.test_output_fit import STEPS, Velocity, guided

OUTPUT: dict[str, Any] = {
    "granularity": "output", "inner": "eager", "truth": "converged", "progress": False, "seeds": 4, "holdout": 1,
}  # fmt: skip
REGIONS = {name: value for name, value in ranks.CALIBRATION.items() if name != "budget"}


class Counted:
    """The sampler of the tests of fitted weights; remembers whole runs: their seeds and steps."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []

    def __call__(self, model: Any, seed: int, steps: int = STEPS) -> Tensor:
        samples = guided(model, seed, steps)
        self.runs.append((seed, steps))
        return samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards of a calibration of the output."""
    folders = []
    for part in range(2):
        folders.append(tmp_path_factory.mktemp("shards") / f"shard{part}")
        moeca.calibrate_shard(Velocity().eval(), guided, part=part, parts=2, resume=folders[-1], **OUTPUT)
    return folders


@pytest.mark.slow
def test_the_schedule_of_merged_shards_is_that_of_one_machine(shards: list[Path], tmp_path: Path) -> None:
    assert moeca.merge_shards(tmp_path / "all", shards) == [0, 1, 2, 3, 1000]
    alone, sampler = Counted(), Counted()
    found = moeca.calibrate(Velocity().eval(), alone, budget="macs:0.5", **OUTPUT)
    merged = moeca.calibrate(Velocity().eval(), sampler, budget="macs:0.5", resume=tmp_path / "all", **OUTPUT)
    assert merged.rows == found.rows
    assert merged.output is not None
    assert found.output is not None
    for ours, theirs in zip(merged.output.weights, found.output.weights, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for name in ("psnr_db", "psnr_db_holdout", "psnr_db_converged_holdout"):
        assert merged.predicted[name] == pytest.approx(found.predicted[name], abs=0.01)
    finer = [run for run in alone.runs if run[1] > STEPS]
    assert len(finer) == 2 * 5
    assert not [run for run in sampler.runs if run[1] > STEPS], "everything that the weights need is in the folder"


def test_the_command_merges(shards: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["merge", str(tmp_path / "all"), *map(str, shards)])
    assert result.exit_code == 0
    assert "all has the uncached samples of 5 seeds" in " ".join(result.output.split())
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["output"]
    again = CliRunner().invoke(cli.app, ["merge", str(tmp_path / "all"), *map(str, shards), "--json"])
    assert json.loads(again.output) == {"seeds": [0, 1, 2, 3, 1000]}


def test_each_shard_samples_its_part_and_the_first_seed(shards: list[Path]) -> None:
    def stems(folder: Path) -> list[str]:
        return sorted(file.stem for file in (folder / "output").glob("truth/*.npy"))

    assert stems(shards[0]) == ["0", "1000", "2"]
    assert stems(shards[1]) == ["0", "1", "3"]
    assert sorted(file.stem for file in (shards[1] / "output" / "wanted_converged").iterdir()) == ["1", "3"]
    assert [file.stem for file in (shards[0] / "output" / "converged").iterdir()] == ["1000"]


@pytest.mark.slow
def test_an_interrupted_shard_goes_on(tmp_path: Path) -> None:
    class Stopped(Counted):
        def __call__(self, model: Any, seed: int, steps: int = STEPS) -> Tensor:
            if (seed, steps) == (3, 2 * STEPS):
                raise KeyboardInterrupt
            return super().__call__(model, seed, steps)

    shard = {"part": 1, "parts": 2, "resume": tmp_path / "shard", **OUTPUT}
    with pytest.raises(KeyboardInterrupt):
        moeca.calibrate_shard(Velocity().eval(), Stopped(), **shard)
    again = Counted()
    moeca.calibrate_shard(Velocity().eval(), again, **shard)
    assert {seed for seed, steps in again.runs if steps > STEPS} == {3}


@pytest.mark.slow
def test_shards_of_regions_and_of_a_whole_calibration(tmp_path: Path) -> None:
    """What a calibration for another budget found serves too: drift and rollouts come over."""
    first, second = tmp_path / "first", tmp_path / "second"
    moeca.calibrate_shard(ranks.model(), ranks.plain_draw, part=1, parts=2, resume=first, **REGIONS)
    found = moeca.calibrate(ranks.model(), ranks.plain_draw, resume=second, **ranks.CALIBRATION)
    for _ in range(2):  # the second time there is nothing left to do
        assert moeca.merge_shards(tmp_path / "all", [first, second]) == [0, 1, 2, 1000, 1001]
        for name in ("rollouts.jsonl", "truth.jsonl", "origins.jsonl"):
            lines = (tmp_path / "all" / "region" / name).read_text().splitlines()
            assert len(lines) == len(set(lines))
    rollouts = [(folder / "region" / "rollouts.jsonl").read_text() for folder in (second, tmp_path / "all")]
    assert rollouts[0] == rollouts[1]
    assert (tmp_path / "all" / "region" / "drift.npz").exists()
    again = moeca.calibrate(ranks.model(), ranks.plain_draw, resume=tmp_path / "all", **ranks.CALIBRATION)
    assert again.rows == found.rows


@pytest.mark.slow
def test_shards_of_other_weights_inputs_or_steps_are_refused(shards: list[Path], tmp_path: Path) -> None:
    def shard(name: str, model: torch.nn.Module, sample: Any) -> Path:
        moeca.calibrate_shard(model, sample, part=1, parts=2, resume=tmp_path / name, **{**OUTPUT, "truth": "uncached"})
        return tmp_path / name

    other = Velocity().eval()
    with torch.no_grad():
        other.a.weight.mul_(1.5)
    cases = {
        "holds other samples for seed 0": shard("weights", other, guided),
        "sampled seed 0 from other inputs": shard("inputs", Velocity().eval(), lambda m, seed: guided(m, seed + 50)),
        "steps is 12 there, 6 here|steps is 6|timesteps is": shard(
            "steps", Velocity().eval(), lambda m, seed: guided(m, seed, 6)
        ),
    }
    for number, (says, folder) in enumerate(cases.items()):
        with pytest.raises(ScheduleError, match=says):
            moeca.merge_shards(tmp_path / f"all{number}", [shards[0], folder])
    with pytest.raises(ScheduleError, match="holds no calibration; name folders that were given as resume"):
        moeca.merge_shards(tmp_path / "none", [tmp_path])


def test_a_damaged_shard_is_named(shards: list[Path], tmp_path: Path) -> None:
    moeca.merge_shards(tmp_path / "first", shards)
    file = tmp_path / "first" / "output" / "wanted_converged" / "1.npz"
    file.with_suffix(".part.npz").write_text("what an interrupt left")
    moeca.merge_shards(tmp_path / "all", [tmp_path / "first"])
    file = tmp_path / "all" / "output" / "wanted_converged" / "1.npz"
    assert not file.with_suffix(".part.npz").exists()
    with np.load(file) as stored:
        arrays = dict(stored)
    for change, says in (
        ({"gram": arrays["gram"][1:]}, "products of"),
        ({"states": arrays["states"] * np.nan}, "finite"),
    ):
        np.savez(file, **{**arrays, **change})
        with pytest.raises(ScheduleError, match=f"1.npz' is damaged: .*{says}.* Delete this file"):
            moeca.calibrate(Velocity().eval(), guided, budget="macs:0.5", resume=tmp_path / "all", **OUTPUT)


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 2), (0, 0), ("0", 2)])
def test_parts_that_are_not_there(part: Any, parts: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected a number from 0 to parts - 1"):
        moeca.calibrate_shard(Velocity(), guided, part=part, parts=parts, resume=tmp_path / "shard", **OUTPUT)
    assert not (tmp_path / "shard").exists()


def test_given_samples_are_compared_as_samples_are(tmp_path: Path) -> None:
    """Up to the rounding of another machine, which goes with the largest value, and not to another shape."""
    samples = np.linspace(-100, 100, 50, dtype=np.float32).reshape(1, 50)

    def shard(name: str, given: np.ndarray[Any, Any]) -> Path:
        store = Store(tmp_path / name / "region")
        store.check({})
        store.add_arrays(GIVEN, 0, {"samples": given})
        return tmp_path / name

    first = shard("first", samples)
    for number, given in enumerate((samples + 0.5, samples[:, 1:])):
        with pytest.raises(ScheduleError, match="was compared with other samples that truth gave for seed 0"):
            moeca.merge_shards(tmp_path / f"all{number}", [first, shard(f"other{number}", given)])
    moeca.merge_shards(tmp_path / "all", [first, shard("near", samples + 0.05)])
