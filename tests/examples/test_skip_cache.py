"""The Skip-Cache example runs, in a short form; moeca's copy and the loop by hand differ by nothing."""

from __future__ import annotations

import importlib

import pytest

example = importlib.import_module("examples.05_skip_cache")


@pytest.mark.slow
def test_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--digits", "4", "--steps", "9"])
    printed = capsys.readouterr().out
    assert "by hand: 0\n" in printed
    assert example.FORECAST in printed
