"""The messages of the package, and those that the page of errors and warnings lists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import moeca_compile
from moeca_compile import errors
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "reference" / "errors.md"
PACKAGE = Path(moeca_compile.__file__).parent
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
OURS = {"InvariantError"}  # faults of the package: one row stands for all of them
WARNS = {"once", "warn", "warn_explicit", "_warn"}
GAP = "…"  # what an f-string fills in
END = "\0"  # between the strings of the package


@dataclass(frozen=True)
class Message:
    """One place that raises or warns. `text` is None where the text is made elsewhere; then `source` says how."""

    where: str
    kind: str
    text: str | None
    source: str


def messages_of(code: str, where: str) -> Iterator[Message]:
    """Every error that is made and every warning that is given."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        kind = ast.unparse(node.func).split(".")[-1]
        if (kind in CLASSES - OURS - {"MoecaWarning"} or kind in WARNS) and node.args:
            first = node.args[0]
            yield Message(f"{where}:{node.lineno}", kind, text_of(first), ast.unparse(first))


def text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values]
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else f"{left or GAP}{right or GAP}"
    return None


def messages() -> list[Message]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += messages_of(path.read_text(), str(path.relative_to(PACKAGE)))
    return found


def strings() -> str:
    """Every string of the package, each once, with `END` between them."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found |= {text_of(node) or "" for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)}
    return END.join(found)


@functools.cache
def rows() -> list[tuple[list[str], str, str]]:
    """Of each row of a table of messages: the fragments that it stands for, the cause and the remedy."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        if line.startswith("| `") and len(cells) == 3 and " " in cells[0]:
            found.append((re.findall(r"`([^`]+)`", cells[0]), cells[1], cells[2]))
    return found


@functools.cache
def fragments() -> list[str]:
    return [fragment for listed, _, _ in rows() for fragment in listed]


@functools.cache
def pattern_of(fragment: str) -> re.Pattern[str]:
    """Cached: there are more fragments than patterns that `re` keeps."""
    return re.compile(f"[^{END}]*".join(map(re.escape, fragment.split(GAP))))


def covers(fragment: str, text: str) -> bool:
    return pattern_of(fragment).search(text) is not None


def letters(text: str) -> int:
    return len(re.findall(r"[a-zA-Z]", text))
