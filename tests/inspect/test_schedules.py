"""Facts, grids and differences of schedules."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console, Group, RenderableType

from moeca_compile.inspect.schedules import difference, facts, grid, parts, table_of_differences, table_of_facts
from moeca_compile.schedule import Schedule
from tests.tools import row

KEYS = ("blocks.0.attn", "blocks.0.moe", "blocks.1.moe")
ONE = Schedule(
    (row("CCC"), row("FFF"), row("CFF"), row("CCC")), KEYS, order=1, timesteps=(4.0, 3.0, 2.0, 1.0),
    made_by="by hand", predicted={"mac_fraction": 0.5, "psnr_db": 48.25},
)  # fmt: skip


def text(what: RenderableType) -> str:
    console = Console(width=120)
    with console.capture() as caught:
        console.print(what)
    return caught.get()


def test_facts_are_counts_of_its_cells() -> None:
    said = facts(ONE)
    assert (said["steps"], said["regions"], said["variants"]) == (4, 3, 3)
    assert (said["computed"], said["forecast"], said["reused"]) == (round(7 / 12, 4), round(5 / 12, 4), 0.0)
    assert said["timesteps"] == [4.0, 1.0]
    assert json.loads(json.dumps(said)) == said


def test_the_table_shows_what_was_predicted() -> None:
    shown = text(table_of_facts(ONE))
    assert "predicted psnr_db" in shown
    assert "48.25" in shown
    assert "period" in shown


def test_the_grid_comes_first_and_few_of_what_was_tried() -> None:
    families = {f"tried family {number}": 40.0 + number for number in range(9)}
    schedule = replace(ONE, predicted={"psnr_db": 48.0, **families})
    shown = text(Group(*parts(schedule)))
    assert shown.index("█▒██") < shown.index("made by")
    assert [line.split()[3] for line in shown.splitlines() if "predicted tried" in line] == ["8", "7", "6"]
    assert "and 6 more were tried: --json lists all" in shown
    assert len(facts(schedule)["predicted"]) == 10


def test_regions_that_do_the_same_share_a_line_of_the_grid() -> None:
    lines = text(grid(ONE)).splitlines()
    assert any("blocks.0.attn" in line and "█▒██" in line for line in lines)
    assert any("blocks.0.moe and 1 more" in line and "█▒▒█" in line for line in lines)


def test_an_open_ended_schedule_says_what_repeats() -> None:
    shown = text(grid(Schedule.uniform(3, warmup=2)))
    assert "every region" in shown
    assert "the last 3 steps repeat" in shown


def test_equal_schedules_don_t_differ() -> None:
    assert not difference(ONE, Schedule.from_json(ONE.to_json()))


def test_each_cell_and_each_fact_that_differs_is_named() -> None:
    other = replace(ONE, rows=(row("CCC"), row("FRR"), row("CFF"), row("CCC")), made_by="by another hand")
    found = difference(ONE, other)
    assert found.facts == (("made_by", "by hand", "by another hand"),)
    assert found.cells == (
        (1, "blocks.0.moe", "FORECAST", "REUSE"),
        (1, "blocks.1.moe", "FORECAST", "REUSE"),
    )
    shown = text(table_of_differences(found, "a.json", "b.json"))
    assert "step 1, blocks.0.moe and 1 more" in shown
    assert "by another hand" in shown


def test_steps_and_regions_that_only_one_has_are_absent_in_the_other() -> None:
    shorter = Schedule((row("CC"),), KEYS[:2], order=1)
    found = difference(ONE, shorter)
    assert (0, "blocks.1.moe", "COMPUTE", None) in found.cells
    assert (3, "blocks.0.attn", "COMPUTE", None) in found.cells
    assert "absent" in text(table_of_differences(found, "a.json", "b.json"))
