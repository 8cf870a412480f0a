"""The pages of the documentation, their code blocks, headings and links."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {
    f"docs/{name}.md" for name in ("benchmarks", "peers", "gpu", "exact", "models")
}  # tests of their own hold them
NOT_RUN = "not run"  # in a block's title: it takes hours, a GPU, a server or a download
LANGUAGES = {"python", "console", "text", "json", "mermaid"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` counts from 1; `title` is what the page shows above it, "" without one."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return NOT_RUN not in self.title

    def commands(self) -> Iterator[list[str]]:
        """The words of each line that begins with a dollar sign, without comments and environment variables."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:], comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                yield words


def page_names() -> list[str]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found if path.exists()]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks_of(page: str) -> list[Block]:
    found = []
    text = text_of(page)
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        title = re.search(r'title="([^"]*)"', info)
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, info.split(" ")[0], title[1] if title else "", body))
    return found


def prose_of(page: str) -> str:
    """The page without its code."""
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text_of(page)))


def anchors_of(page: str) -> set[str]:
    """What the headings of a page can be linked by, as GitHub and MkDocs make it."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def links_of(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def git(*words: str) -> str:
    """What git says of the checkout, whoever owns that: a container often runs as another user. Skips without git."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and the checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
