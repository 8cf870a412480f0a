"""Links between pages lead somewhere, without MkDocs too."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, anchors_of, links_of, page_names, text_of

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

BESIDE = ["benchmarks/README.md", "CHANGELOG.md", "integrations/comfyui/README.md", "integrations/vllm_omni/README.md"]


@pytest.mark.parametrize("page", [*page_names(), *BESIDE])
def test_links_lead_somewhere(page: str) -> None:
    for link in links_of(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            named = str(target.resolve().relative_to(ROOT.resolve()))
            assert anchor in anchors_of(named), f"{page}: {link}; {named} has {sorted(anchors_of(named))}"


@pytest.mark.parametrize("page", page_names())
def test_files_that_are_named_exist(page: str) -> None:
    for named in re.findall(r"`((?:tests|benchmarks|examples|docs)/[\w./-]*\w)`", text_of(page)):
        assert (ROOT / named).exists() or (ROOT / f"{named}.py").exists(), f"{page}: {named}"


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in page_names():
        if page.startswith("docs/"):
            assert f" {page.removeprefix('docs/')}\n" in listed, f"{page} is missing from mkdocs.yml"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
