"""What can be said of a block without running it: its names, keywords and commands exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import tomllib
from dataclasses import fields
from typing import Any

import moeca_compile as moeca
from tests.docs.pages import ROOT

OUTSIDE = {"cd", "docker", "git", "tritonserver", "trtexec"}  # commands that aren't ours


def check_python(text: str) -> None:
    """Parse; resolve what is imported from the package and what is called on it, keywords too."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moeca_compile"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith("moeca."):
            check_call(name.removeprefix("moeca."), node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moeca":
            assert hasattr(moeca, node.attr), f"moeca_compile has no {node.attr}"


def check_call(name: str, node: ast.Call) -> None:
    called: Any = moeca
    for part in name.split("."):
        called = getattr(called, part)
    known = inspect.signature(called).parameters
    options = {field.name for field in fields(moeca.Options)}
    free = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for keyword in node.keywords:
        taken = keyword.arg is None or keyword.arg in known or (free and (name != "compile" or keyword.arg in options))
        assert taken, f"moeca.{name} takes no {keyword.arg}"


def check_command(words: list[str]) -> None:
    """Its program, target, module, extras, subcommand and options exist."""
    program, rest = words[0].rsplit("/", 1)[-1], words[1:]
    if program == "make":
        targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, rest
    elif program in ("python", "python3"):
        assert rest[0] == "-m", "a module is run with -m"
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif program == "torchrun":
        assert importlib.util.find_spec(rest[rest.index("-m") + 1]), rest
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"(?:moeca-compile|\.)\[([\w,-]+)\]", " ".join(rest)):
            assert set(asked.split(",")) <= set(extras), asked
    elif program == "moeca":
        check_moeca(rest)
    else:
        assert program in OUTSIDE or (ROOT / words[0]).exists(), words


def check_moeca(words: list[str]) -> None:
    import typer

    from moeca_compile import cli

    group: Any = typer.main.get_command(cli.app)
    if words[0].startswith("-"):
        return
    command = group.commands[words[0]]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[1:]:
        if word.startswith("-"):
            assert word in options | {"--help", "-h"}, f"moeca {words[0]} takes no {word}"
