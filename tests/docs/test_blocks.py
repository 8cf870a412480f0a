"""Every code block of the pages runs, or is checked and says in its title that no test runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.docs.checks import check_command, check_python
from tests.docs.pages import GENERATED, LANGUAGES, ROOT, Block, blocks_of, page_names
from tests.docs.world import namespace

if not (ROOT / "docs").exists():
    pytest.skip("needs the checkout", allow_module_level=True)

WRITTEN = [page for page in page_names() if page not in GENERATED]
# what takes seconds, and what is made by it: run by the `slow` tests
LONG = re.compile(r"\b(calibrate|expert_thresholds|export|moeca\.save|moeca\.load)\(|\.moeca\b|\"(half|fox)\.json\"")
QUICK = ("README.md", "docs/start/", "docs/tutorials/")  # what a newcomer reads; the other pages' blocks are slow tests
SEVERAL = {"docs/start/first-run.md"}  # these compile five models or more
COMMANDS = {"show", "diff", "info", "verify", "run", "bench", "export", "calibrate", "plan", "drift"}


def is_long(block: Block) -> bool:
    return bool(LONG.search(block.text))


def run(page: str, monkeypatch: pytest.MonkeyPatch, folder: Path, long: bool) -> None:
    """The page's blocks one after the other, in an empty folder. Without `long`, none after the first long one."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    names = namespace(monkeypatch)
    torch._dynamo.reset()
    for block in blocks_of(page):
        if not block.is_run or (is_long(block) and not long):
            continue
        if block.title.endswith(".py"):
            (folder / block.title).write_text(block.text)
        elif block.language == "python":
            text = block.text.replace('"speedup:2"', '"macs:0.5"')  # the tiny model's time isn't in its arithmetic
            code = compile("\n" * block.line + text, str(ROOT / page), "exec")
            with torch.no_grad():
                exec(code, names)
        elif block.language == "console" and long:
            for words in block.commands():
                if words[0] == "moeca" and words[1] in COMMANDS:
                    run_command(words[1:], block)


def run_command(words: list[str], block: Block) -> None:
    from typer.testing import CliRunner

    from moeca_compile import cli

    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code in (0, 1 if words[0] == "diff" else 0), f"{block.where}: {words}: {result.output}"


@pytest.mark.parametrize("page", page_names())
def test_blocks_say_what_they_are(page: str) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"
        try:
            if block.language == "python":
                check_python(block.text)
            elif block.language == "console":
                commands = list(block.commands())
                assert commands, "no line begins with a dollar sign"
                for words in commands:
                    check_command(words)
            elif block.language == "json":
                json.loads(block.text)
        except (AssertionError, SyntaxError, ValueError, KeyError, AttributeError) as error:
            raise AssertionError(f"{block.where}: {error}") from error


def has_python(page: str, long: bool) -> bool:
    return any(b.language == "python" and b.is_run and is_long(b) == long for b in blocks_of(page))


def is_quick(page: str) -> bool:
    return page.startswith(QUICK) and page not in SEVERAL


@pytest.mark.filterwarnings("default::moeca_compile.errors.MoecaWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (not is_quick(page)))
        for page in WRITTEN
        if has_python(page, False) and (is_quick(page) or not has_python(page, True))  # the test below runs all blocks
    ],
)
def test_the_blocks_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(page, monkeypatch, tmp_path, long=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::moeca_compile.errors.MoecaWarning")
@pytest.mark.parametrize("page", [page for page in WRITTEN if has_python(page, True)])
def test_the_long_blocks_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(page, monkeypatch, tmp_path, long=True)
