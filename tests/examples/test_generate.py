"""`make demo` runs, in a short form and with a third of the blocks, and its figures are in order."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from torch import nn

import moeca_compile as moeca
from examples import digits
from moeca_compile.schedule import Schedule

generate = importlib.import_module("examples.01_generate")
GRANULARITIES = {generate.REGIONS: "region", generate.OUTPUT: "output"}


def blocks_of_digits(depth: int) -> nn.Module:
    model = digits.load_weights(digits.build_model(), digits.MODEL_FILE)
    model.blocks = model.blocks[:depth]
    return model


def explained(model: nn.Module, granularity: str, schedule: object) -> Schedule:
    return moeca.explain(model, *generate.example_inputs(), schedule=schedule, granularity=granularity).schedule


@pytest.mark.parametrize("name", generate.CACHED)
def test_the_schedules_of_the_demo_are_of_its_model(name: str) -> None:
    schedule = explained(digits.load_model(), GRANULARITIES[name], generate.CACHED[name])
    assert len(schedule.rows) == 50


@pytest.mark.slow  # it compiles a model four times; .ci/run has it
def test_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / f"{granularity}.json" for name, granularity in GRANULARITIES.items()}
    for name, granularity in GRANULARITIES.items():
        explained(blocks_of_digits(2), granularity, "uniform:3").save(files[name])
    monkeypatch.setattr(generate, "CACHED", files)
    monkeypatch.setattr(digits, "load_model", lambda: blocks_of_digits(2))
    picture = tmp_path / "demo.png"
    generate.main(["--json", "--runs", "1", "--picture", str(picture)])
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["steps"], told["samples"]) == (50, generate.BATCH)
    figures = told["contenders"]
    assert list(figures) == [generate.PLAIN, generate.PREPARED, generate.REGIONS, generate.OUTPUT]
    for name, one in figures.items():
        assert one["speedup"] == pytest.approx(figures[generate.PLAIN]["seconds"] / one["seconds"])
        caching = figures[generate.PREPARED]["seconds"] / one["seconds"]
        assert one["speedup_caching"] == (None if name == generate.PLAIN else pytest.approx(caching))
        assert one["compile_seconds"] > 0.1
        if name in GRANULARITIES:
            assert 0.1 < one["mac_fraction"] < 0.6
            assert one["speedup"] > 1
            assert one["speedup_caching"] > 1
            assert one["psnr_db"] > 20
            assert one["state_bytes"] > 0
    assert figures[generate.PLAIN]["psnr_db"] is None
    assert figures[generate.PREPARED]["psnr_db"] is None or figures[generate.PREPARED]["psnr_db"] > 80
    assert picture.read_bytes().startswith(b"\x89PNG")
