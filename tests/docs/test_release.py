"""What a release needs beside the code: one version, a citation, and forms for issues that name what exists."""

from __future__ import annotations

import re
import tomllib

import pytest

import moeca_compile
from tests.docs.pages import ROOT

if not (ROOT / "CITATION.cff").exists():
    pytest.skip("needs the checkout", allow_module_level=True)
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_version_has_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "moeca_compile/__init__.py"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == moeca_compile.__version__


def test_the_citation_has_what_the_format_asks_for() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    names = set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors"} <= names


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_forms_for_issues_are_forms(form: object) -> None:
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load(form.read_text())  # type: ignore[attr-defined]
    if "body" not in data:
        assert set(data) <= {"blank_issues_enabled", "contact_links"}
        return
    assert data["name"]
    assert data["description"]
    for field in data["body"]:
        assert field["attributes"]["label"]
        assert field["id"]


def test_the_form_for_faults_asks_for_the_doctor() -> None:
    assert "moeca doctor --report" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
