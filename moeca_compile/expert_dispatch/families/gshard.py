"""Family: one-hot dispatch and combine tensors [tokens, experts, capacity], as in GShard.

    capacity = counts.max().item()                         # nothing is dropped
    chunks = torch.einsum("sec,sm->ecm", dispatch, x).chunk(E)
    out = torch.einsum("sec,ecm->sm", combine, torch.cat([expert(c) for c, expert in zip(chunks, experts)]))

Seen in HunyuanImage-3. The router's ids and weights, from before the one-hots, feed the canonical call; whatever has
the capacity as a size goes. A capacity read off the tokens that drops some of them doesn't pass the proof and is left
alone; a capacity that is a number from the start is static, drops included, and needs no rewriting.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeca_compile.expert_dispatch.families import collected
from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.method import Layout
from moeca_compile.expert_dispatch.proof.attempt import Candidate, Harness
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.source.loop import SORTED, Loop


def propose(harness: Harness, loop: Loop, layouts: Sequence[Layout]) -> Candidate | str | None:
    """The method without its capacity, why it must keep it, or None where it is static or can't be run."""
    if loop.source.decorators:
        return f"{loop.name} is decorated with {', '.join(loop.source.decorators)}, which a rewritten one would lose"
    reason = None
    for entry in entries(harness, loop):
        before = blocker(harness, loop.source, entry)
        if before is None:
            continue
        if before == "":
            return None
        found = collected.attempt(harness, loop, iter([entry]))
        if isinstance(found, Candidate):
            return found
        reason = f"{found}: where the capacity, read from the counts, drops tokens, it can't be left out"
    return reason


FAMILY = Family("gshard", SORTED | {"item", "unique"}, propose=propose, calls=frozenset({"einsum", "bmm", "tensordot"}))
