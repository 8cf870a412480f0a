"""The folder of a dump is for reading, and for comparing two runs."""

from __future__ import annotations

from pathlib import Path

import torch

from moeca_compile.options import Options
from moeca_compile.passes.dump import TIMES, does_nothing
from moeca_compile.pipeline import FIND, LOWER_INDUCTOR, LOWER_ONNX, NORMALIZE, PROLOGUE, REWRITE, build_variant
from tests.passes.blocks import Block, Timed, latent, times
from tests.tools import analyze_module, row, schedule_of


def dumped(folder: Path) -> Path:
    torch.manual_seed(0)
    options = Options(inner="eager", dump=folder)
    analysis = analyze_module(Timed(Block()), latent(), times(), options=options)
    schedule = schedule_of(analysis, *("C" * len(analysis.facts.regions), "F" * len(analysis.facts.regions)))
    for number, one in enumerate(schedule.distinct_rows()):
        build_variant(analysis, schedule, one, options, f"v{number}")
    return folder


def test_two_runs_differ_in_nothing_but_times(tmp_path: Path) -> None:
    first, second = dumped(tmp_path / "a"), dumped(tmp_path / "b")
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    assert {name for name in names if (first / name).read_bytes() != (second / name).read_bytes()} <= {TIMES}


def test_variants_and_the_schedule_are_in_it(tmp_path: Path) -> None:
    folder = dumped(tmp_path)
    text = (folder / "variant_v1.txt").read_text()
    assert text.startswith("v1: F")
    assert "MACs\ntakes " in text
    assert "reads state_000: y0 of output 0 of region 0, float32 [" in text
    assert "def forward(" in text
    assert "writes state_000: y0" in (folder / "variant_v0.txt").read_text()
    assert "#/" in (folder / "schedule.txt").read_text()
    index = (folder / "index.md").read_text()
    assert "[variant](variant_v1.txt)" in index
    assert index.count("[schedule](schedule.txt)") == 1


def test_another_schedule_gets_a_file_of_its_own(tmp_path: Path) -> None:
    dumped(tmp_path)
    options = Options(inner="eager", dump=tmp_path)
    analysis = analyze_module(Timed(Block()), latent(), times(), options=options)
    letters = "C" * len(analysis.facts.regions)
    build_variant(analysis, schedule_of(analysis, letters, letters), row(letters), options, "v0")
    assert {path.name for path in tmp_path.glob("[sv]*.txt")} == {
        "schedule.txt", "schedule.1.txt", "variant_v0.txt", "variant_v0.1.txt", "variant_v1.txt",
    }  # fmt: skip


def test_every_pass_of_the_page_says_when_it_does_nothing() -> None:
    passes = {*NORMALIZE, *REWRITE, *PROLOGUE, *LOWER_INDUCTOR, *LOWER_ONNX}
    always = {"tag_row", "hand_out", "verify_variant"}  # decide, give out and check in every graph
    silent = {one.__name__ for one in (*passes, *FIND) if not does_nothing(one)}
    assert silent <= always
