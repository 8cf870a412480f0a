"""What a dispatch family is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeca_compile.expert_dispatch.families.inline import whole_or_loop
from moeca_compile.expert_dispatch.families.method import Layout
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Harness
from moeca_compile.expert_dispatch.source.loop import Loop

Propose = Callable[[Harness, Loop, Sequence[Layout]], Candidate | str | None]


@dataclass(frozen=True)
class Family:
    """One kind of dispatch: known by any of `evidence` in its loop and, where given, by any call of `calls` in its
    method; the arguments of a method that is nothing else come in one of `layouts`.

    `propose` gives the rewritten method, or why there is none, or None where inference doesn't reach the loop.
    """

    name: str
    evidence: frozenset[str]
    layouts: tuple[Layout, ...] = ()
    propose: Propose = whole_or_loop
    calls: frozenset[str] = frozenset()

    def claims(self, loop: Loop) -> bool:
        return bool(loop.evidence & self.evidence) and (not self.calls or bool(loop.calls & self.calls))
