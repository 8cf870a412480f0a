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

from moeca_compile.canonical import inline
from moeca_compile.canonical.attempt import Entry, Proposal, Rewrite, Stand, run
from moeca_compile.canonical.entries import entries
from moeca_compile.canonical.family import Family
from moeca_compile.canonical.loop import GUARDED, Loop
from moeca_compile.canonical.method import Layout
from moeca_compile.canonical.probe import isolated
from moeca_compile.canonical.source import rebuild
from moeca_compile.canonical.straighten import WATCH, guards, straighten, watched
from moeca_compile.canonical.traceable import blocker

_SEEDS = (1, 2, 3)
_REMEDY = "Compute it for all rows and keep the masked ones with torch.where(mask[:, None], new, old)"


def propose(stand: Stand, loop: Loop, layouts: Sequence[Layout]) -> Proposal | str | None:
    """The method without its branches, or why not, or None where inference meets none of them."""
    bent = loop.source.bent
    assert bent is not None
    if loop.source.decorators:
        return f"{loop.name} is decorated with {', '.join(loop.source.decorators)}, which a rewritten one would lose"
    line = f"{bent.file.rsplit('/', 1)[-1]}:{guards(bent)[0]}"
    reason = f"no way to run {loop.name}({', '.join(bent.parameters[1:])}) is known that fills and empties the mask of "
    reason += f"the branch at {line}"
    for entry, met in _telling(stand, loop):
        if blocker(stand, bent, entry) == "":
            return None
        found = _rewritten(stand, loop, entry, met)
        if isinstance(found, Proposal):
            return found
        reason = f"the branch at {line} can't be straightened: {found}"
    return f"{reason}. {_REMEDY}"


def _rewritten(stand: Stand, loop: Loop, entry: Entry, met: frozenset[int]) -> Proposal | str:
    """`met`: lines of the branches that this entry comes to. The others stay: nothing is known of them."""
    assert loop.source.bent is not None
    passed_by = sorted(set(guards(loop.source.bent)) - met)
    if passed_by and loop.nest:
        return f"the branch at line {passed_by[0]} wasn't reached"
    if passed_by:
        loop = replace(loop, source=straighten(loop.source.bent, met))
    if loop.nest:
        routed = inline.attempt(stand, loop, [entry])
        if isinstance(routed, str):
            return routed
        if routed is not None:
            return _checked(stand, loop, routed)
    rewrite = Rewrite(loop.name, loop.source, "straightened", None, stand.experts, loop.source.tree)
    proposal = Proposal(rewrite, entry)
    problem = stand.disagreement(proposal)
    if problem:
        return problem.replace("the gate-weighted sum of each token's experts", "the same without the branch")
    return _checked(stand, loop, proposal)


def _checked(stand: Stand, loop: Loop, proposal: Proposal) -> Proposal | str:
    left = blocker(stand, loop.source, proposal.entry, proposal.rewrite)
    return f"{left} still reads a size or a value out of a tensor" if left else proposal


def _telling(stand: Stand, loop: Loop) -> Iterator[tuple[Entry, frozenset[int]]]:
    """Entries under which each branch that is reached sees a mask that picks nothing and one that picks all; and the
    lines of these branches."""
    assert loop.source.bent is not None
    tree = watched(loop.source.bent)
    for entry in entries(stand, loop):
        seen: dict[int, set[str]] = {}

        def watch(line: int, mask: torch.Tensor, seen: dict[int, set[str]] = seen) -> None:
            kind = "all" if bool(mask.all()) else "some" if bool(mask.any()) else "none"
            seen.setdefault(line, set()).add(kind)

        function = rebuild(loop.source, tree, {WATCH: watch})
        try:
            for number in _SEEDS:
                with isolated():
                    module = stand.copy()
                    module.__dict__[loop.name] = types.MethodType(function, module)
                    run(module, entry, entry.arguments(stand, number, torch.float32))
        except Exception:
            continue
        if seen and all({"all", "none"} <= kinds for kinds in seen.values()):
            yield entry, frozenset(seen)


FAMILY = Family("masked_branches", frozenset({GUARDED}), propose=propose)
