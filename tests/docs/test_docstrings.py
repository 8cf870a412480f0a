"""Every public name has a complete docstring, and the check of that can fail."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moeca_compile.errors import OptionError
from tests.docs.docstrings import problems_of, public_values

VALUES = public_values()


@pytest.mark.parametrize("name", VALUES)
def test_docstring_is_complete(name: str) -> None:
    assert list(problems_of(name, VALUES[name])) == []


def undocumented(first: int) -> int:
    return first


def incomplete(first: int, second: int) -> int:
    """Add two numbers.

    Args:
        first: the one.

    Raises:
        ValueError: never.
    """
    if second < 0:
        raise OptionError("negative")
    return first + second


def complete(first: int, *others: int, **named: int) -> int:
    """Add numbers.

    Args:
        first: the one.
        *others, **named: more of them.

    Returns:
        Their sum.
    """
    return first + sum(others) + sum(named.values())


@dataclass
class Halved:
    """A pair.

    Attributes:
        left: the first one.
    """

    left: int
    right: int

    def swap(self) -> None:
        self.left, self.right = self.right, self.left

    @property
    def both(self) -> int:
        return self.left + self.right


def test_the_check_finds_what_is_missing() -> None:
    assert list(problems_of("f", undocumented)) == ["f: no docstring, or a first sentence without an end"]
    assert list(problems_of("f", incomplete)) == [
        "f: Args doesn't name second",
        "f: Returns is missing",
        "f: Raises doesn't name OptionError",
        "f: Raises names ValueError, which is no error of the package",
    ]
    assert list(problems_of("f", complete)) == []
    assert list(problems_of("C", Halved)) == [
        "C: Attributes doesn't name right",
        "C.swap: no docstring, or a first sentence without an end",
        "C.both: the property has no docstring",
    ]


def test_operators_are_documented() -> None:
    """Each operator's implementation names every argument of the schema, with its shape."""
    import torch

    from moeca_compile.ops import branch_slots, branches, experts, rows, top_k
    from tests.docs.docstrings import entries_of

    implementations = {
        "experts": experts.segments,
        "align": branch_slots.align,
        "branches_": branches.branches_,
        "branches_.at": branches.branches_at_,
        "forecast_branches": branches.forecast_branches,
        "keep_branches_": branches.keep_branches_,
        "pick": branch_slots.pick,
        "top_k": top_k.top_k,
        "unwritten": rows.unwritten,
    }
    every = torch._C._dispatch_get_all_op_names()
    defined = {name.removeprefix("moeca::") for name in every if name.startswith("moeca::")}
    assert defined == set(implementations)
    for name, function in implementations.items():
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.moeca, packet), overload or "default")._schema
        assert list(problems_of(name, function)) == []
        assert {argument.name for argument in schema.arguments} <= entries_of(function.__doc__ or "", "Args")


def test_every_command_and_option_has_a_help_text() -> None:
    import typer

    from moeca_compile import cli

    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, f"moeca {name} has no help"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"moeca {name}: {parameter.name} has no help"
