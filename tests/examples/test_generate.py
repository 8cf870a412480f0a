"""`make demo` runs, in a short form and with a third of the blocks, and its figures are in order."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from torch import nn

import moeca_compile as moeca
from examples import digits

generate = importlib.import_module("examples.01_generate")


def blocks_of_digits(depth: int) -> nn.Module:
    model = digits.load_weights(digits.build_model(), digits.MODEL_FILE)
    model.blocks = model.blocks[:depth]
    return model


@pytest.mark.slow  # it compiles a model three times; .ci/run has it
def test_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    explained = moeca.explain(digits.load_model(), *generate.example_inputs(), schedule=generate.SCHEDULE)
    assert len(explained.schedule.rows) == 50
    made = moeca.explain(blocks_of_digits(2), *generate.example_inputs(), schedule="uniform:3").schedule
    made.save(tmp_path / "every_third.json")
    monkeypatch.setattr(generate, "SCHEDULE", tmp_path / "every_third.json")
    monkeypatch.setattr(digits, "load_model", lambda: blocks_of_digits(2))
    picture = tmp_path / "demo.png"
    generate.main(["--json", "--runs", "1", "--picture", str(picture)])
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["steps"] == 50
    assert 0.1 < figures["mac_fraction"] < 0.6
    assert figures["speedup"] > 1
    assert figures["speedup_caching"] > 1
    assert figures["speedup"] == pytest.approx(figures["speedup_prepared"] * figures["speedup_caching"])  # of one run
    assert figures["psnr_db"] > 20
    assert figures["state_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
