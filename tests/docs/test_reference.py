"""The reference says what the package has."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import moeca_compile as moeca
from moeca_compile.runtime.bundle.manifest import Manifest
from tests.docs.pages import ROOT, blocks_of, text_of

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)


def test_every_option_is_there_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)`[^|]* \|", text_of("docs/reference/options.md"), re.MULTILINE))
    assert listed == {one.name: json.dumps(v) if isinstance(v := value_of(one.name), str) else repr(v)
                      for one in fields(moeca.Options)}  # fmt: skip


def value_of(name: str) -> object:
    return getattr(moeca.Options(), name)


def test_every_extra_is_in_the_install_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = text_of("docs/start/install.md")
    for extra in project["optional-dependencies"]:
        assert re.search(rf"^\|[^|]*`{extra}`[^|]*\|", page, re.MULTILINE), extra


def test_every_public_name_is_in_the_api() -> None:
    page = text_of("docs/reference/api.md")
    for name in moeca.__all__:
        assert f"::: moeca_compile.{name}\n" in page or name == "MoecaError", name


def test_every_entry_of_the_manifest_is_there() -> None:
    page = text_of("docs/reference/bundle.md")
    for name in set(Manifest.__struct_fields__) - {"format", "version", "made_with", "fused"}:
        assert f"`{name}`" in page, name


def test_the_schedule_on_the_page_is_what_its_code_writes(tmp_path: Path) -> None:
    code, written = (one for one in blocks_of("docs/reference/schedule-file.md")[:2])
    names: dict[str, object] = {}
    exec(code.text.replace("half.json", str(tmp_path / "half.json")), names)
    found = json.loads((tmp_path / "half.json").read_text())
    assert found == json.loads(written.text)
    page = text_of("docs/reference/schedule-file.md")
    for name in found:
        assert f"`{name}`" in page, name


def test_the_architecture_has_every_room_in_the_order_of_imports() -> None:
    page = text_of("docs/explanation/architecture.md")
    package = Path(str(moeca.__file__)).parent
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)) == rooms
    drawn = text_of("docs/explanation/rooms.svg")
    assert {room for room in rooms if not re.search(rf">[^<]*\b{room}\b", drawn)} == set()
    order = re.search(r"^ORDER = \((.*?)^\)", text_of("tests/test_structure.py"), re.MULTILINE | re.DOTALL)
    assert order is not None
    told = re.search(r"in a circle: (.*?)`cli`\.", page, re.DOTALL)
    assert told is not None
    names = re.findall(r"^ +\"(\w+)\"", order[1], re.MULTILINE)
    assert [one for one in [*re.findall(r"`(\w+)`", told[1]), "cli"] if one in rooms] == [
        n for n in names if n in rooms
    ]


def test_the_graphs_on_the_page_are_those_of_its_model() -> None:
    from docs.worked_example import graphs

    shown = [block.text for block in blocks_of("docs/explanation/how-it-works.md") if block.language == "text"]
    for name, text in graphs().items():
        assert text in shown, f"python -m docs.worked_example prints another graph {name}"
