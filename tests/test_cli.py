"""`moeca`, command by command: what is printed, the exit status, and one line for every mistake."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moeca_compile as moeca
from moeca_compile.cli import app
from moeca_compile.errors import MoecaError
from moeca_compile.runtime.bundle.manifest import MANIFEST, SCHEDULE
from moeca_compile.schedule import Schedule
from tests import toy
from tests.tools import row

ONE = Schedule((row("CC"), row("FF"), row("CF")), ("attn", "moe"), order=1, made_by="by hand")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    ONE.save(tmp_path / "one.json")
    replace(ONE, rows=(row("CC"), row("FF"), row("CC"))).save(tmp_path / "two.json")
    return str(tmp_path / "one.json"), str(tmp_path / "two.json")


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_show(files: tuple[str, str]) -> None:
    status, said = run("show", files[0])
    assert status == 0
    assert "by hand" in said
    assert "█▒█" in said


def test_show_as_json_is_json(files: tuple[str, str]) -> None:
    status, said = run("show", files[0], "--json")
    assert status == 0
    assert json.loads(said)["variants"] == 3


def test_show_of_a_bundle_shows_its_schedule(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    ONE.save(tmp_path / SCHEDULE)
    status, said = run("show", str(tmp_path))
    assert status == 0
    assert "by hand" in said


def test_show_draws(files: tuple[str, str], tmp_path: Path) -> None:
    assert run("show", files[0], "--picture", str(tmp_path / "grid.svg"))[0] == 0
    assert "<svg" in (tmp_path / "grid.svg").read_text()


def test_diff_says_what_differs_and_exits_1(files: tuple[str, str]) -> None:
    status, said = run("diff", *files)
    assert status == 1
    assert "step 2, moe" in said
    status, said = run("diff", *files, "--json")
    assert status == 1
    assert json.loads(said)["cells"] == [[2, "moe", "FORECAST", "COMPUTE"]]


def test_diff_of_equals_exits_0(files: tuple[str, str]) -> None:
    assert run("diff", files[0], files[0]) == (0, "the same\n")


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    command = [sys.executable, "-c", "from moeca_compile.cli import main; main()", "show", str(tmp_path / "no.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"moeca: schedule file '{tmp_path / 'no.json'}': not a readable schedule: format is missing\n"
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_calibrate_and_then_another_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeca_compile")
    weights, kept = tmp_path / "w.safetensors", tmp_path / "kept"
    save_file(toy.model().state_dict(), weights)
    common = (
        "tests.toy:model", "--sample", "tests.toy:sample", "--weights", str(weights), "--inner", "eager",
        "--seeds", "2", "--holdout", "1", "--granularity", "region", "--resume", str(kept),
    )  # fmt: skip
    status, said = run("calibrate", *common, "--budget", "macs:0.6", "--out", str(tmp_path / "60.json"), "--json")
    assert status == 0
    assert json.loads(said)["predicted"]["mac_fraction"] <= 0.6
    status, said = run(
        "calibrate", *common, "--budget", "macs:0.6", "--out", str(tmp_path / "60.json"), "--perturb", "2"
    )
    assert status == 0
    assert "stale" not in said
    assert sum("4 for stale experts" in text for text in caplog.messages) == 1  # the price is told once, by parts
    status, said = run("calibrate", *common, "--budget", "macs:0.4", "--out", str(tmp_path / "40.json"))
    assert status == 0
    assert "calibrated for macs:0.4" in said
    assert Schedule.load(tmp_path / "40.json").predicted["mac_fraction"] <= 0.4
    front = tmp_path / "front.json"
    status, said = run("calibrate", *common, "--budget", "macs:0.4", "--budget", "macs:0.6", "--out", str(front))
    assert status == 0
    assert f"schedule='{front}@macs:0.4'" in said.replace("\n", "")
    assert Schedule.parse(f"{front}@macs:0.6").rows == Schedule.load(tmp_path / "60.json").rows
    assert run("drift", str(kept), "--picture", str(tmp_path / "d.png"), "--experts", str(tmp_path / "e.svg"))[0] == 0
    assert (tmp_path / "d.png").stat().st_size > 1000
    status, said = run("drift", str(kept), "--json")
    assert status == 0
    assert [len(line) for line in json.loads(said)["experts"].values()] == [4, 4]
    assert len(json.loads(said)["steps"]["all regions, 1 old"]) == 8
    assert sum(value is not None for line in json.loads(said)["stale"].values() for value in line) == 2
    assert "PSNR in dB with one expert stale" in run("drift", str(kept))[1]


@pytest.mark.slow
def test_calibrate_to_samples_of_a_file_or_folder(tmp_path: Path) -> None:
    """Samples of a schedule are the truth: it is found, and the uncached run isn't as near."""
    model = moeca.compile(toy.model().eval(), schedule="uniform:2", inner="eager")
    with torch.no_grad():
        samples = {str(seed): toy.sample(model, seed).numpy() for seed in (0, 1)}
    np.savez(tmp_path / "truth.npz", **samples)
    for seed, array in samples.items():
        np.save(tmp_path / f"{seed}.npy", array)
    np.savez(tmp_path / "fewer.npz", **{seed: array[:2] for seed, array in samples.items()})
    found, out = [], tmp_path / "found.json"
    words = (
        "calibrate", "tests.toy:model", "--sample", "tests.toy:sample", "--inner", "eager", "--seeds", "2",
        "--holdout", "0", "--granularity", "region", "--order", "1", "--budget", "macs:0.6", "--json", "--out",
        str(out),
    )  # fmt: skip
    for truth in (tmp_path / "truth.npz", tmp_path):
        status, said = run(*words, "--truth", str(truth))
        assert status == 0, said
        found.append(Schedule.load(out))
    with pytest.raises(MoecaError, match=r"for seed 0 have shape \[2, 2, 4, 4\], the sampler's \[3, 2, 4, 4\]"):
        CliRunner().invoke(app, [*words, "--truth", str(tmp_path / "fewer.npz")], catch_exceptions=False)
    assert found[0].rows == found[1].rows
    predicted = found[0].predicted
    assert predicted["psnr_db_given"] > predicted["uncached_psnr_db_given"] + 20


@pytest.mark.slow
def test_drift_by_sampling(tmp_path: Path) -> None:
    words = ("drift", "tests.toy:model", "--sample", "tests.toy:sample")
    status, said = run(*words, "--picture", str(tmp_path / "d.png"), "--experts", str(tmp_path / "e.svg"))
    assert status == 0
    assert all(title in said for title in ("region", "branches of", "routed sum of", "experts of"))
    assert min((tmp_path / name).stat().st_size for name in ("d.png", "e.svg")) > 1000
    status, said = run(*words, "--gap", "2", "--json")
    assert status == 0
    found = json.loads(said)
    assert (found["steps"], found["gap"], found["seeds"]) == (8, 2, 1)
    assert found["regions"]["blocks.1.moe"]["by_step"]["transitions"][:2] == [None, None]


def refused(*words: str) -> str:
    with pytest.raises(MoecaError) as error:
        CliRunner().invoke(app, words, catch_exceptions=False)
    return str(error.value)


def test_what_can_t_be_loaded_is_said(tmp_path: Path) -> None:
    rest = ("--budget", "macs:0.5", "--out", str(tmp_path / "s.json"))
    sample = ("--sample", "tests.toy:sample")
    assert "expected MODULE:FUNCTION" in refused("calibrate", "tests.toy", *sample, *rest)
    assert "'tests.nowhere:model' can't be loaded" in refused("calibrate", "tests.nowhere:model", *sample, *rest)
    missing = ("--weights", str(tmp_path / "no.safetensors"))
    assert run("calibrate", "tests.toy:model", *sample, *missing, *rest)[0] == 2


def test_drift_of_a_folder_takes_no_options_of_sampling(tmp_path: Path) -> None:
    assert "are for a model that is sampled now: add --sample" in refused("drift", str(tmp_path), "--gap", "2")
    assert "holds no calibration" in refused("drift", str(tmp_path))
