"""The page of errors and warnings lists every class, and messages that the package has."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import moeca_compile
from moeca_compile import errors
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "reference" / "errors.md"
PACKAGE = Path(moeca_compile.__file__).parent

if not PAGE.exists():
    pytest.skip("needs the checkout", allow_module_level=True)


def texts() -> list[str]:
    """Every string of the package; what an f-string fills in is an ellipsis."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [said_of(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return found


def said_of(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def listed_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \| [^`|].* \| .* \|$", PAGE.read_text(), re.MULTILINE)


def pattern_of(message: str) -> str:
    return ".*".join(map(re.escape, message.split("…")))


def test_every_class_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \| `\w+` \|", PAGE.read_text(), re.MULTILINE))
    known = {name for name, one in vars(errors).items() if isinstance(one, type) and one.__module__ == errors.__name__}
    assert listed == known
    for name, base in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE):
        assert importlib.import_module(errors.__name__).__dict__[name].__mro__[1].__name__ == base


def test_every_message_is_one_of_the_package() -> None:
    messages = listed_messages()
    assert len(messages) > 80
    known = texts()
    gone = [one for one in messages if not any(re.search(pattern_of(one), text, re.DOTALL) for text in known)]
    assert not gone, "the package has no such message; change it here, or put it back there"


def warned() -> list[str]:
    """Texts that are written where the package warns."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if name in ("warn", "once", "_warn") and isinstance(node, ast.Call) and node.args:
                found += [said_of(node.args[0])] if isinstance(node.args[0], ast.Constant | ast.JoinedStr) else []
    return found


def test_every_warning_is_listed() -> None:
    listed = [pattern_of(message) for message in listed_messages()]
    texts = warned()
    assert len(texts) > 10
    told = [text for text in texts if len(re.findall(r"\w+", text)) > 6]  # of others the words stand elsewhere
    missing = [text for text in told if not any(re.search(one, text, re.DOTALL) for one in listed)]
    assert not missing
