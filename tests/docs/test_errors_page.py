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
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_class_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \| `\w+` \|", PAGE.read_text(), re.MULTILINE))
    known = {name for name, one in vars(errors).items() if isinstance(one, type) and one.__module__ == errors.__name__}
    assert listed == known
    for name, base in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE):
        assert importlib.import_module(errors.__name__).__dict__[name].__mro__[1].__name__ == base


def test_every_message_is_one_of_the_package() -> None:
    messages = re.findall(r"^\| `([^`]+)` \| [^`|].* \| .* \|$", PAGE.read_text(), re.MULTILINE)
    assert len(messages) > 80
    known = texts()
    gone = [
        message
        for message in messages
        if not any(re.search(".*".join(map(re.escape, message.split("…"))), text, re.DOTALL) for text in known)
    ]
    assert not gone, "the package has no such message; change it here, or put it back there"
