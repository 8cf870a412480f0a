"""Family: branches on whether a mask picks anything, around the router, the experts or both.

    if uncond.any(): ids[uncond] = null_expert
    if cond.any(): rows = torch.where(cond)[0]; ids[rows] = (F.normalize(x[rows]) @ prototypes.T).argmax(-1)

Seen in ProMoE, token choice and expert choice: unconditional tokens or samples go to an expert of their own. Each
branch is run for all rows and written under its mask; an expert loop behind it is rewritten as in the other families.
Where experts themselves stand in such a branch they run on all rows, the price of a static shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.proof.candidate import (
    NOT_NEEDED,
    Candidate,
    Entry,
    Proposal,
    Rank,
    Rewrite,
    Unproven,
    raised,
)
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.packed_experts import PackedHarness
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.rewrite.one_loop import one_loop
from moeca_compile.expert_dispatch.rewrite.one_result import decorated
from moeca_compile.expert_dispatch.rewrite.whole_method import packed_method
from moeca_compile.expert_dispatch.source.loop import GUARDED, Loop
from moeca_compile.expert_dispatch.source.method_source import Source, rebuild
from moeca_compile.expert_dispatch.source.straighten import WATCH, guards, straighten, watched

_SEEDS = (1, 2, 3)
_REMEDY = "Compute it for all rows and keep the masked ones with torch.where(mask[:, None], new, old)"


class MaskedBranches(Family):
    """Branches on empty masks, in `forward` or in helpers that it calls."""

    name = "masked_branches"

    def match(self, code: ModuleCode) -> Iterable[Loop]:
        return [loop for loop in code.combined if GUARDED in loop.evidence]

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Proposal]:
        """The method without its branches."""
        if isinstance(harness, PackedHarness):
            yield from packed_method(harness, loop, ())
            return
        problem = decorated(loop)
        if problem is not None:
            yield problem
            return
        branched = _branched(loop)
        for entry, lines in _telling(harness, loop):
            if blocker(harness, branched, entry) == "":
                yield NOT_NEEDED
                return
            yield from _straightened(harness, loop, entry, lines)
        parameters = ", ".join(branched.parameters[1:])
        reason = f"no way to run {loop.name}({parameters}) is known that fills and empties the mask"
        yield Unproven(reason, Rank.NO_ENTRY)

    def explain(self, loop: Loop, unproven: Unproven) -> str:
        if unproven.rank is Rank.SETTLED:
            return unproven.reason
        branched = _branched(loop)
        line = f"{branched.file.rsplit('/', 1)[-1]}:{guards(branched)[0]}"
        return f"the branch at {line} can't be straightened: {unproven.reason}. {_REMEDY}"


def _branched(loop: Loop) -> Source:
    """The method with its branches, which the loop's source has straightened."""
    assert loop.source.branched is not None
    return loop.source.branched


def _straightened(harness: Harness, loop: Loop, entry: Entry, lines: frozenset[int]) -> Iterator[Proposal]:
    """`lines`: of the branches that this entry comes to. The others stay: nothing is known of them."""
    branched = _branched(loop)
    passed_by = sorted(set(guards(branched)) - lines)
    if passed_by and loop.nest:
        yield Unproven(f"the branch at line {passed_by[0]} wasn't reached", Rank.NO_PARTS)
        return
    if passed_by:
        loop = replace(loop, source=straighten(branched, lines))
    for proposal in one_loop(harness, loop, [entry]) if loop.nest else (NOT_NEEDED,):
        if proposal is NOT_NEEDED:  # no loop, or none that this entry comes to: only the branches change
            rewrite = Rewrite(loop.name, loop.source, "straightened", None, harness.experts, loop.source.tree)
            yield Candidate(rewrite, entry, to_capture=True)
        else:
            yield replace(proposal, to_capture=True) if isinstance(proposal, Candidate) else proposal


def _telling(harness: Harness, loop: Loop) -> Iterator[tuple[Entry, frozenset[int]]]:
    """Entries under which each branch that is reached sees a mask that picks nothing and one that picks all; and the
    lines of these branches."""
    tree = watched(_branched(loop))
    for entry in entries(harness, loop):
        masks: dict[int, set[str]] = {}

        def watch(line: int, mask: torch.Tensor, masks: dict[int, set[str]] = masks) -> None:
            kind = "all" if bool(mask.all()) else "some" if bool(mask.any()) else "none"
            masks.setdefault(line, set()).add(kind)

        function = rebuild(loop.source, tree, {WATCH: watch})
        try:
            for seed in _SEEDS:
                harness.observed(entry, loop.name, function, seed)
        except Exception as error:  # whatever somebody's method can raise for arguments that aren't its own
            raised(f"{loop.name} was tried with other arguments than its own", error)
            continue
        if masks and all({"all", "none"} <= kinds for kinds in masks.values()):
            yield entry, frozenset(masks)
