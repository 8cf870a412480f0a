"""Pictures: what is drawn, and where they can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeca_compile.errors import UserError
from moeca_compile.inspect import plots
from moeca_compile.schedule import Schedule
from tests.tools import row


def test_the_grid_has_a_cell_for_each_region_and_step() -> None:
    schedule = Schedule((row("CC"), row("FC"), row("RF")), ("attn", "moe"), order=1)
    (axes,) = plots.schedule_grid(schedule).axes
    (image,) = axes.images
    assert image.get_array().tolist() == [[0, 1, 2], [0, 0, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn", "moe"]
    assert [entry.get_text() for entry in axes.get_legend().get_texts()] == ["compute", "forecast", "reuse"]


def test_an_open_ended_schedule_is_drawn_as_long_as_asked() -> None:
    (axes,) = plots.schedule_grid(Schedule.uniform(3), steps=7).axes
    assert axes.images[0].get_array().tolist() == [[0, 1, 1, 0, 1, 1, 0]]


def test_drifts_are_lines_on_a_log_scale() -> None:
    figure = plots.drift_map({"attn": [1e-3, 1e-2], "moe": [float("nan"), 1e-1]})
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (2, 2)
    assert (image.norm.vmin, image.norm.vmax) == (1e-3, 1e-1)


def test_lines_of_unequal_length_are_filled_up() -> None:
    figure = plots.drift_map({"attn": [0.1], "moe": [0.2, 0.3]})
    assert figure.axes[0].images[0].get_array().shape == (2, 2)


def test_a_curve_goes_from_cheap_to_dear() -> None:
    series = {"uniform": [(0.5, 48.0), (0.3, 46.0)], "calibrated": [(0.3, 50.0)]}
    figure = plots.pareto(series, "MACs", "PSNR", {"others": [(0.4, 45.0), (0.2, 44.0)]}, "toy")
    uniform, calibrated, others = figure.axes[0].lines
    assert (others.get_linestyle(), list(others.get_xdata())) == ("None", [0.4, 0.2])
    assert figure.axes[0].get_title() == "toy"
    assert list(uniform.get_xdata()) == [0.3, 0.5]
    assert list(calibrated.get_ydata()) == [50.0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_written(tmp_path: Path, suffix: str) -> None:
    path = plots.save(plots.schedule_grid(Schedule.uniform(2)), tmp_path / f"grid{suffix}")
    assert path.stat().st_size > 1000


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grid.jpeg: a picture is written as .png or .svg"):
        plots.save(plots.schedule_grid(Schedule.uniform(2)), tmp_path / "grid.jpeg")


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(UserError, match="drift_map: nothing to draw"):
        plots.drift_map({})
    with pytest.raises(UserError, match="pareto: nothing to draw"):
        plots.pareto({"uniform": []}, "MACs", "PSNR")
