"""A method read from its file and compiled again behaves as before."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moeca_compile.expert_dispatch.source.method_source import loads, read, rebuild, stores, suites

FREE = [1]


class Base:
    def value(self) -> int:
        return 10


def make(captured: int) -> type:
    class Method(Base):
        def __init__(self) -> None:
            self.__hidden = 5

        def run(self, a: int, b: int = 2, *rest: int, scale: int = 3) -> int:
            """A text
            with less indentation than the code."""
            return (super().value() + self.__hidden + captured + a + b + sum(rest) + FREE[0]) * scale

        @torch.no_grad()
        def quiet(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @functools.lru_cache  # noqa: B019
        def cached(self) -> int:
            return 1

    return Method


def test_rebuilt_methods_keep_closure_defaults_and_private_names() -> None:
    method = make(7)
    source = read(method.run)
    assert source is not None
    assert source.parameters == ("self", "a", "b")
    assert source.required == ("a",)
    assert not source.is_plain
    again = rebuild(source, source.tree, {})
    for arguments, options in (((1,), {}), ((1, 4, 5, 6), {"scale": -1})):
        assert again(method(), *arguments, **options) == method().run(*arguments, **options)
    assert again.__qualname__ == method.run.__qualname__


def test_changed_code_can_use_helpers() -> None:
    source = read(make(0).run)
    assert source is not None
    tree = copy.deepcopy(source.tree)
    tree.body = ast.parse("return _helper(self, a)").body
    assert rebuild(source, tree, {"_helper": lambda _, a: a + 100})(make(0)(), 1) == 101


def test_lines_are_those_of_the_file() -> None:
    source = read(make(0).run)
    assert source is not None
    with open(source.file) as file:
        assert "def run(" in file.read().splitlines()[source.tree.lineno - 1]
    assert rebuild(source, source.tree, {}).__code__.co_firstlineno == source.tree.lineno


@pytest.mark.parametrize(("name", "decorators"), [("quiet", ()), ("cached", ("functools.lru_cache",)), ("run", ())])
def test_decorators_that_matter(name: str, decorators: tuple[str, ...]) -> None:
    source = read(vars(make(0))[name])
    assert source is not None
    assert source.decorators == decorators


def test_no_source() -> None:
    space: dict[str, Callable[..., Any]] = {}
    exec("def made(self): return 1", space)
    assert read(space["made"]) is None
    assert read(lambda self: 1) is None


def test_names() -> None:
    tree = ast.parse("x += y\nz[i] = w\na, b = f(c)")
    assert loads(tree) == {"x", "y", "z", "i", "w", "f", "c"}
    assert stores(tree) == {"x", "a", "b"}


def test_suites_stay_in_the_function() -> None:
    text = "def f():\n if a:\n  b\n else:\n  c\n for d in e:\n  def g():\n   hidden\n"
    text += " try:\n  h\n except E:\n  i\n with j:\n  k"
    names = {ast.unparse(s) for suite in suites(ast.parse(text).body[0]) for s in suite if isinstance(s, ast.Expr)}
    assert names == {"b", "c", "h", "i", "k"}
