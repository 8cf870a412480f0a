"""The page of models: made of the committed facts, and nothing else."""

from __future__ import annotations

import pytest

from tests import facts


def test_the_page_is_made_of_the_facts() -> None:
    if not facts.PAGE.exists():
        pytest.skip("needs the checkout")
    assert facts.PAGE.read_text() == facts.render(facts.load())


def test_every_table_has_rows() -> None:
    if not facts.PAGE.exists():
        pytest.skip("needs the checkout")
    known = facts.load()
    assert all(known.get(table) for table in facts.TABLES)


def test_a_fact_that_changed_is_named() -> None:
    known: facts.Facts = {"models": {"A": {"found": "2 attention", "cached": "yes"}}}
    assert not facts.differing({"models": {"A": {"found": "2 attention"}}}, known)
    (said,) = facts.differing({"models": {"A": {"found": "1 attention"}}}, known)
    assert said == "models: A: found: '1 attention', docs/models.json says '2 attention'"
    assert len(facts.differing({"models": {"B": {"found": "1"}}}, known)) == 1


def test_a_row_is_a_line_of_its_table() -> None:
    page = facts.render({"models": {"A|B": {"found": "2 attention", "exported": "yes"}}})
    assert "| A\\|B | 2 attention |  |  |  |  | yes |" in page
    assert page.count("## ") == len(facts.TABLES)
