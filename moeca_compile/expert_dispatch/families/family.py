"""What a dispatch family is: one form in which models write an expert dispatch, in one file.

1. `match` recognizes the form: it gives the places in a module's methods that are written in it.
2. `propose` gives candidate calls for one place: `Candidate(rewrite, entry)`, or `Unproven(reason, rank)`.
3. `Rewrite` is what would be installed: one method's changed code. Only compilers see it, and only while the experts
   are what was proven. `Entry` is the evidence: how the module is run, with which inputs.
4. Nobody trusts a family. Each candidate is compared with the original, results and state, on random tokens and
   stand-in experts, then on the module's own weights; the first that agrees is installed.
5. Where none agrees, `explain` says why, from the reason that says most of the dispatch (`Rank`).
6. A family keeps no state: one object serves all models and threads. Its place in `FAMILIES` says when it is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.proof.candidate import Proposal, Unproven
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.layouts import Layout
from moeca_compile.expert_dispatch.proof.packed_experts import PackedHarness
from moeca_compile.expert_dispatch.rewrite.one_loop import one_loop
from moeca_compile.expert_dispatch.rewrite.whole_method import packed_method, whole_method
from moeca_compile.expert_dispatch.source.loop import Loop


class Family(ABC):
    """One form of expert dispatch. Subclasses set `name`, what reports call it, and give `match` and `propose`."""

    name: str = ""

    @abstractmethod
    def match(self, code: ModuleCode) -> Iterable[Loop]:
        """The dispatches of this form in a module.

        Args:
            code: the module's methods and the expert loops in them; `code.module` is the module itself.

        Returns:
            Each place, with the path of the experts that it dispatches to. A place that an earlier family gave too is
            that family's.
        """

    @abstractmethod
    def propose(self, harness: Harness, loop: Loop) -> Iterator[Proposal]:
        """Candidates for one place, the likely ones first, and what speaks against it.

        Args:
            harness: runs copies of the module; knows the experts' widths and their number.
            loop: one that `match` gave.

        Returns:
            Candidates, to be proven, and reasons why there is none. `NOT_NEEDED`, or nothing at all, says that there is
            nothing to rewrite and nothing to report.
        """

    def explain(self, loop: Loop, unproven: Unproven) -> str:
        """The reason that a report gives for a dispatch that was left alone.

        Args:
            loop: one that `match` gave.
            unproven: of all reasons the first of the highest rank.

        Returns:
            The reason, as `PrepareReport.rejected` shows it.
        """
        return unproven.reason


def method_or_loop(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Iterator[Proposal]:
    """What most forms need: the method as a whole where it is nothing but a dispatch, else only its loop.

    Args:
        harness: the module.
        loop: the dispatch.
        layouts: shapes of a method's three arguments, the likely ones first.

    Returns:
        Candidates, and reasons why there is none.
    """
    if isinstance(harness, PackedHarness):
        yield from packed_method(harness, loop, layouts)
        return
    yield from whole_method(harness, loop, layouts)
    yield from one_loop(harness, loop, entries(harness, loop))
