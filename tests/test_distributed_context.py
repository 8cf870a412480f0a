"""diffusers' context parallelism over two ranks. Half a minute: CI runs the other tests of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import ranks


@pytest.mark.slow
def test_diffusers_context_parallelism(tmp_path: Path) -> None:
    """Each rank keeps the state of its own tokens; a reused step gathers the output, and exchanges nothing else."""
    results = ranks.run("context_parallel", tmp_path)
    assert [status for status, _ in results] == [0, 0]
    assert results[0][1] == results[1][1]
    _, result = results[0]
    assert torch.allclose(torch.tensor(result["plain"]), torch.tensor(result["whole"]), atol=1e-5)
    assert result["full"] == result["plain"]
    assert [own == plain for own, plain in zip(result["uniform:3"], result["plain"], strict=True)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    assert torch.allclose(torch.tensor(result["uniform:3"]), torch.tensor(result["whole cached"]), atol=1e-5)
    assert result["collectives"] == {"v0": 3 * 4 + 1, "v1": 1}  # queries, keys, values and results of three blocks
    assert result["state_bytes"] * 2 == result["whole_state_bytes"] > 0
