"""Family: one-hot dispatch and combine tensors [tokens, experts, capacity], as in GShard.

    capacity = counts.max().item()                         # nothing is dropped
    chunks = torch.einsum("sec,sm->ecm", dispatch, x).chunk(E)
    out = torch.einsum("sec,ecm->sm", combine, torch.cat([expert(c) for c, expert in zip(chunks, experts)]))

Seen in HunyuanImage-3. The router's ids and weights, from before the one-hots, feed the canonical call; whatever has
the capacity as a size goes. A capacity read off the tokens that drops some of them doesn't pass the proof and is left
alone; a capacity that is a number from the start is static, drops included, and needs no rewriting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.proof.candidate import NOT_NEEDED, Proposal, Rank, Unproven
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.packed_experts import PackedHarness
from moeca_compile.expert_dispatch.proof.traceable import blocker
from moeca_compile.expert_dispatch.rewrite.one_result import decorated, one_result
from moeca_compile.expert_dispatch.rewrite.whole_method import packed_method
from moeca_compile.expert_dispatch.source.loop import GUARDED, SORTED, Loop

_READS_CAPACITY = SORTED | {"item", "unique"}
_COMBINES = frozenset({"einsum", "bmm", "tensordot"})


class GShard(Family):
    """Capacity tensors, whose size is read back from the counts."""

    name = "gshard"

    def match(self, code: ModuleCode) -> Iterable[Loop]:
        """In the methods as they are; where these hold no loop, in `forward` with the router put into it."""
        loops = code.loops or [loop for loop in code.combined if GUARDED not in loop.evidence]
        return [loop for loop in loops if loop.evidence & _READS_CAPACITY and loop.calls & _COMBINES]

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Proposal]:
        """The method without its capacity."""
        if isinstance(harness, PackedHarness):
            yield from packed_method(harness, loop, ())
            return
        problem = decorated(loop)
        if problem is not None:
            yield problem
            return
        for entry in entries(harness, loop):
            place = blocker(harness, loop.source, entry)
            if place == "":
                yield NOT_NEEDED
                return
            if place is not None:
                yield from one_result(harness, loop, [entry])

    def explain(self, loop: Loop, unproven: Unproven) -> str:
        if unproven.rank is Rank.SETTLED:
            return unproven.reason
        return f"{unproven.reason}: where the capacity, read from the counts, drops tokens, it can't be left out"
