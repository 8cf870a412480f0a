"""Family: branches on whether a mask picks anything, around the router, the experts or both.

    if uncond.any(): ids[uncond] = null_expert
    if cond.any(): rows = torch.where(cond)[0]; ids[rows] = (F.normalize(x[rows]) @ prototypes.T).argmax(-1)

Seen in ProMoE, token choice and expert choice: unconditional tokens or samples go to an expert of their own. Each
branch is run for all rows and written under its mask; an expert loop behind it is rewritten as in the other families.
Where experts themselves stand in such a branch they run on all rows, the price of a static shape.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from moeca_compile.expert_dispatch.families import inline
from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.method import Layout
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Entry, Harness, Rewrite, run
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.probe import isolated
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.source.loop import GUARDED, Loop
from moeca_compile.expert_dispatch.source.method_source import rebuild
from moeca_compile.expert_dispatch.source.straighten import WATCH, guards, straighten, watched

_SEEDS = (1, 2, 3)
_REMEDY = "Compute it for all rows and keep the masked ones with torch.where(mask[:, None], new, old)"


def propose(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Candidate | str | None:
    """The method without its branches, or why not, or None where inference meets none of them."""
    bent = loop.source.bent
    assert bent is not None
    if loop.source.decorators:
        return f"{loop.name} is decorated with {', '.join(loop.source.decorators)}, which a rewritten one would lose"
    line = f"{bent.file.rsplit('/', 1)[-1]}:{guards(bent)[0]}"
    reason = f"no way to run {loop.name}({', '.join(bent.parameters[1:])}) is known that fills and empties the mask of "
    reason += f"the branch at {line}"
    for entry, met in _telling(harness, loop):
        if blocker(harness, bent, entry) == "":
            return None
        found = _rewritten(harness, loop, entry, met)
        if isinstance(found, Candidate):
            return found
        reason = f"the branch at {line} can't be straightened: {found}"
    return f"{reason}. {_REMEDY}"


def _rewritten(harness: Harness, loop: Loop, entry: Entry, met: frozenset[int]) -> Candidate | str:
    """`met`: lines of the branches that this entry comes to. The others stay: nothing is known of them."""
    assert loop.source.bent is not None
    passed_by = sorted(set(guards(loop.source.bent)) - met)
    if passed_by and loop.nest:
        return f"the branch at line {passed_by[0]} wasn't reached"
    if passed_by:
        loop = replace(loop, source=straighten(loop.source.bent, met))
    if loop.nest:
        routed = inline.attempt(harness, loop, [entry])
        if isinstance(routed, str):
            return routed
        if routed is not None:
            return _checked(harness, loop, routed)
    rewrite = Rewrite(loop.name, loop.source, "straightened", None, harness.experts, loop.source.tree)
    candidate = Candidate(rewrite, entry)
    problem = harness.disagreement(candidate)
    if problem:
        return problem.replace("the gate-weighted sum of each token's experts", "the same without the branch")
    return _checked(harness, loop, candidate)


def _checked(harness: Harness, loop: Loop, candidate: Candidate) -> Candidate | str:
    left = blocker(harness, loop.source, candidate.entry, candidate.rewrite)
    return f"{left} still reads a size or a value out of a tensor" if left else candidate


def _telling(harness: Harness, loop: Loop) -> Iterator[tuple[Entry, frozenset[int]]]:
    """Entries under which each branch that is reached sees a mask that picks nothing and one that picks all; and the
    lines of these branches."""
    assert loop.source.bent is not None
    tree = watched(loop.source.bent)
    for entry in entries(harness, loop):
        seen: dict[int, set[str]] = {}

        def watch(line: int, mask: torch.Tensor, seen: dict[int, set[str]] = seen) -> None:
            kind = "all" if bool(mask.all()) else "some" if bool(mask.any()) else "none"
            seen.setdefault(line, set()).add(kind)

        function = rebuild(loop.source, tree, {WATCH: watch})
        try:
            for number in _SEEDS:
                with isolated():
                    module = harness.copy()
                    module.__dict__[loop.name] = types.MethodType(function, module)
                    run(module, entry, entry.arguments(harness, number, torch.float32))
        except Exception:
            continue
        if seen and all({"all", "none"} <= kinds for kinds in seen.values()):
            yield entry, frozenset(seen)


FAMILY = Family("masked_branches", frozenset({GUARDED}), propose=propose)
