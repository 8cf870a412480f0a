"""Measurements say of which commit they are; pictures are small, described, and what their commands draw."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, git, page_names, text_of

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

from docs import pictures

COMMIT = re.compile(r"commit `?([0-9a-f]{7,40})\b")
RECORDED = re.compile(r'commit(?: |": ")([0-9a-f]{7,40})\b')
FIGURE = re.compile(r"\d\.\d|\d ?%")
NOT_MEASURED = {
    "docs/models.md",
    "docs/reference/errors.md",
    "docs/reference/schedule-file.md",
    "docs/reference/options.md",
}
MANY = 6  # figures in a table


def without_commit(text: str) -> list[str]:
    """Headings of sections that have a table of measurements, where neither they nor the page's head name a commit."""
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    found = []
    for section in [head, *sections]:
        tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
        cells = [cell for table in tables for line in table.splitlines()[2:] for cell in line.split("|")]
        measured = sum(bool(FIGURE.search(cell)) for cell in cells) >= MANY
        if measured and not (COMMIT.search(section) or COMMIT.search(head)):
            found.append(section.split("\n")[0])
    return found


@pytest.mark.parametrize("page", [page for page in page_names() if page not in NOT_MEASURED])
def test_tables_of_measurements_name_a_commit(page: str) -> None:
    assert without_commit(text_of(page)) == []


def test_a_table_without_a_commit_is_found() -> None:
    table = "## Speed\n\n| a | b |\n|---|---|\n" + "| 1.5 | 20 % |\n" * 3
    assert without_commit(f"# Page\n\n{table}") == ["## Speed"]
    assert without_commit(f"# Page\n\n{table}\n(commit 39c0545)\n") == []
    assert without_commit(f"# Page, commit 39c0545\n\n{table}") == []


def test_the_readme_counts_the_models_of_the_table() -> None:
    rows = json.loads((ROOT / "docs/models.json").read_text())["models"]
    transformers = [row for row in rows if row.startswith("diffusers: ") and ", " not in row and "UNet" not in row]
    cached = [row for row in transformers if rows[row]["cached"].startswith("equal")]
    readme = text_of("README.md")
    assert f"the code of {len(transformers)} transformers of diffusers" in readme
    assert f"{len(cached)} of the {len(transformers)} are cached" in readme


def test_commits_that_are_named_are_in_the_history() -> None:
    """A commit that was rebased away still exists where it was made, and nowhere else."""
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("needs the whole history")
    history = git("rev-list", "HEAD")
    texts = {page: COMMIT.findall(text_of(page)) for page in page_names()}
    results = {path.name: RECORDED.findall(path.read_text()) for path in (ROOT / "benchmarks/results").rglob("*.json")}
    assert any(results.values())
    lost = [
        f"{where}: {named}"
        for where, commits in (texts | results).items()
        for named in commits
        if f"\n{named}" not in f"\n{history}"
    ]
    assert not lost, lost


def test_pictures_are_described_and_small() -> None:
    for page in page_names():
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text_of(page)):
            assert len(alt.split()) >= 3, f"{page}: {target} has no text for those who can't see it"
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
    assert sum(path.stat().st_size for path in pictures.IMAGES.iterdir()) < 200_000


def test_the_drawing_of_imports_is_that_of_the_test(tmp_path: Path) -> None:
    pictures.draw_imports(tmp_path / "imports.svg")
    assert (tmp_path / "imports.svg").read_text() == (pictures.IMAGES / "imports.svg").read_text()


def test_the_drawing_of_rooms_is_what_its_command_draws() -> None:
    assert pictures.ROOMS.read_text() == pictures.rooms.svg()


def test_the_grid_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures.draw_schedule(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_digits_are_as_good_as_their_captions_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality = pictures.draw_digits(tmp_path / "digits.png")
    told = [
        text for page in page_names() for text in re.findall(r"digits\.png\).*?([\d.]+) dB", text_of(page), re.DOTALL)
    ]
    assert told
    assert all(abs(float(text) - quality) < 0.5 for text in told)
