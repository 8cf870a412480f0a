"""docs/peers.md: the committed page is that of the committed figures, and figures of two runs stand in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.equal import measure, page

RESULTS = Path("benchmarks/results")


def line(name: str, count: int, **facts: Any) -> dict[str, Any]:
    return {"name": name, "count": count, **facts}


def test_new_figures_take_the_place_of_old_ones_and_all_others_stay() -> None:
    known = [
        line("moeca output, polynomial", 25), line("moeca output, fitted to uncached", 10),
        line("MagCache (diffusers)", 25, digits=32), line("MagCache (diffusers)", 10, digits=32),
    ]  # fmt: skip
    unipc = "UniPC (diffusers), optimized times"
    new = [line("MagCache (diffusers)", 10, digits=64), line(unipc, 10, digits=64), line(unipc, 25, digits=64)]
    assert measure.merged(known, new) == [*known[:2], new[2], new[1], known[2], new[0]]


def test_the_page_says_which_figures_are_of_another_run() -> None:
    result = json.loads((RESULTS / "peers_equal.json").read_text())
    run = page.when(result["machine"])
    lines = [line("A", 25, when=run), line("B", 25, when="later"), line("B", 10, when="later"), line("C", 10)]
    assert page.later(lines, run) == "\n- Of another run, later: B."
    lines += [line("B", 17), line("D, lite", 25, when="later"), line("B", 13, when="last")]
    assert page.later(lines, run) == (
        "\n- Of another run, later, at 25, 10: B.\n- Of another run, later: D, lite.\n- Of another run, last, at 13: B."
    )


def test_a_lead_over_other_schedules_than_todays_is_marked() -> None:
    ours = line("moeca output, fitted to uncached", 10, ours={"uncached": "new"})
    leads = {truth: [1.0, 0.1] for truth in page.TRUTHS}
    drawn_now = line("A", 10, ours={"uncached": "new"}, lead_db=leads)
    drawn_then = line("B", 10, ours={"uncached": "old"}, lead_db=leads)
    assert page.earlier(page.marked([ours, drawn_now])) == ""
    lines = page.marked([ours, drawn_now, drawn_then])
    assert "they are others now" in page.earlier(lines)
    table = page.leads(lines[1:], page.TRUTHS[0], [10])
    assert "| A | +1.0 ± 0.1 |" in table
    assert "| B | +1.0 ± 0.1† |" in table


def test_no_limit_is_said_in_words() -> None:
    both = {truth: [1.0, 0.1] for truth in page.TRUTHS}
    drawn = line(
        "DBCache", 25, kind="cache", tried=1, evaluations=18.0, macs=0.5, digits=64, psnr_db=both, lead_db=both,
        worst_5_percent_db=dict.fromkeys(page.TRUTHS, 0.5), setting="threshold 0.1, at most -1 cached in a row",
    )  # fmt: skip
    assert "| threshold 0.1, no limit on cached steps in a row |" in page.table([drawn], 25, "digits")
