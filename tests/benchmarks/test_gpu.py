"""`python -m benchmarks.gpu`: runs in its quick form, and says so where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path: Path) -> None:
    gpu.main(["--quick", "--out", str(tmp_path)])
    ((name, run),) = json.loads((tmp_path / "gpu.json").read_text())["runs"].items()
    assert name == "S/2-8E2A, 64 px, batch 1 with guidance"
    run = run["contenders"]
    assert {gpu.BASELINE, "everything computed", "interval 3"} <= set(run)
    assert run["everything computed"]["mac_fraction"] == 1.0
    assert run["interval 3"]["mac_fraction"] < 0.7
    assert run["interval 3"]["state_bytes"] > 0
    gpu.main(["--quick", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["runs"]) == 1, "the same run anew"


def test_the_page_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = gpu.PAGE.read_text()
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    gpu.main(["--report"])
    assert gpu.PAGE.read_text() == committed


def test_readme_has_the_speedups_of_the_results() -> None:
    readme = " ".join(Path("README.md").read_text().split())
    runs = list(json.loads((gpu.RESULTS / "gpu.json").read_text())["runs"].values())[:-1]  # the last is an older one
    for interval in (2, 3, 5):
        found = [run["contenders"][f"interval {interval}{gpu.GRAPHS}"]["speedup"] for run in runs]
        assert f"{min(found):.2f} to {max(found):.2f} times at `uniform:{interval}`" in readme


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is here" in capsys.readouterr().err
