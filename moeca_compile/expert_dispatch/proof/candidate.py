"""What a family proposes for a dispatch, and what speaks against a proposal."""

from __future__ import annotations

import ast
import copy
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moeca_compile.expert_dispatch.proof.anatomy import ADAPTED
from moeca_compile.expert_dispatch.proof.any_experts import following
from moeca_compile.expert_dispatch.proof.experts import ModuleExperts
from moeca_compile.expert_dispatch.routed import NAME, Experts, Routed
from moeca_compile.expert_dispatch.source.loop import Loop
from moeca_compile.expert_dispatch.source.method_source import Source, located, rebuild

if TYPE_CHECKING:
    from moeca_compile.expert_dispatch.proof.harness import Harness

Arguments = tuple[Tensor, ...]
_COMPARED = (bool, int, float, str)
log = logging.getLogger(__name__)


class Pin(NamedTuple):
    """A parameter that a rewritten method was proven for one value of: calls with another value run the original code.

    `place`: of the parameter among the positional ones after self, -1 where it has none.
    """

    name: str
    place: int
    default: Any
    value: Any

    def holds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives the parameter this value."""
        passed = args[self.place] if 0 <= self.place < len(args) else kwargs.get(self.name, self.default)
        if isinstance(self.value, _COMPARED):
            return type(passed) is type(self.value) and passed == self.value
        return passed is self.value


@dataclass(frozen=True)
class Rewrite:
    """A changed method. Equal code, equal rewrite.

    Attributes:
        name: of the method.
        source: the method as it was.
        code: the new one as text; it calls `routed` as `_moeca_routed`.
        routed: what the call computes; None where only branches were changed.
        experts: where the experts keep their weights.
        tree: the new method, as a tree with the lines of the old one.
        pins: arguments for which it was proven; a call with others runs the original code.
    """

    name: str
    source: Source
    code: str
    routed: Routed | None
    experts: Experts
    tree: ast.FunctionDef = field(compare=False, repr=False)
    pins: tuple[Pin, ...] = ()

    @staticmethod
    def of(loop: Loop, tree: ast.FunctionDef, routed: Routed) -> Rewrite:
        """The method of `loop` with the code of `tree`."""
        return Rewrite(loop.name, loop.source, ast.unparse(tree), routed, routed.experts, tree)

    @staticmethod
    def with_body(loop: Loop, code: str, routed: Routed) -> Rewrite:
        """The method of `loop` with `code` for its body.

        Args:
            loop: the dispatch; errors in the new code then point at its line.
            code: statements. They call `routed` as `_moeca_routed(self, tokens, ids, weights)`.
            routed: what the call computes, and with which experts.

        Returns:
            The rewrite, not proven yet.
        """
        tree = copy.copy(loop.source.tree)
        place = loop.nest[0] if loop.nest else loop.source.tree
        tree.body = [located(statement, place) for statement in ast.parse(code).body]
        return Rewrite.of(loop, tree, routed)

    def fitting(self, owner: nn.Module) -> Rewrite:
        """The form for the experts as they are in `owner`."""
        return self.following() if self.experts.condition(owner) == ADAPTED else self

    def following(self) -> Rewrite:
        """The same with experts that run by their own forward: adapters on them are followed."""
        if self.routed is None or not isinstance(self.experts, ModuleExperts):
            return self
        experts = following(self.experts)
        return replace(self, routed=replace(self.routed, experts=experts), experts=experts)

    def function(self, routed: Routed | None = None) -> types.FunctionType:
        """The method as a function; it calls `routed` where that is given."""
        return rebuild(self.source, self.tree, {NAME: routed or self.routed} if self.routed is not None else {})


@dataclass(frozen=True)
class Entry:
    """How to make a module run its dispatch.

    Attributes:
        method: the method to call.
        arguments: `(harness, seed, dtype)` -> the positional arguments, equal for equal seeds.
        flags: boolean arguments that aren't at their default, by name.
    """

    method: str
    arguments: Callable[[Harness, int, torch.dtype], Arguments]
    flags: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A rewrite, and the calls under which it is compared with the original.

    Attributes:
        rewrite: what would be installed.
        entry: how the module is run, original and rewritten.
        to_capture: the rest of the method stays as it is, and nothing in it may read a size or a value out of a tensor.
    """

    rewrite: Rewrite
    entry: Entry
    to_capture: bool = False


class Rank(IntEnum):
    """How much a reason says of the dispatch, the least first."""

    NO_ENTRY = 0  # no way to run the method is known
    NOT_RUN = 1  # a run raised
    NO_PARTS = 2  # it ran, and tokens, ids or weights weren't found
    READS_BACK = 3  # what is left of the method can't be captured
    DIFFERENT = 4  # original and rewritten method ran and didn't agree
    OWN_WEIGHTS = 5  # they agreed, and not on the module's own weights
    SETTLED = 6  # no other attempt can find out more


@dataclass(frozen=True)
class Unproven:
    """Why an attempt gave no rewriting. Of all attempts' reasons the report gives the first of the highest rank.

    Attributes:
        reason: half a sentence with "it" for the dispatch.
        rank: how much the reason says.
    """

    reason: str
    rank: Rank


# Inference doesn't come to the dispatch, or it can be captured as it is: there is nothing to tell.
NOT_NEEDED = Unproven("", Rank.SETTLED)
Proposal = Candidate | Unproven


def raised(what: str, error: Exception) -> Unproven:
    """A run of somebody's module raised: the reason names the error, the traceback goes to the debug log."""
    log.debug("%s", what, exc_info=error)
    return Unproven(f"{what} ({type(error).__name__}: {error})", Rank.NOT_RUN)
