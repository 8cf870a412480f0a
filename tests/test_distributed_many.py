"""Many random schedules of a model that is cut over two ranks. Minutes: CI runs the other tests of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_thousand_random_schedules_with_delays(tmp_path: Path) -> None:
    """No hang, and both ranks have the same bits."""
    (_, first), (_, second) = ranks.run("schedules", tmp_path, limit=1800)
    assert first["digest"] == second["digest"]
    assert first["computed"] == second["computed"] > 1000
