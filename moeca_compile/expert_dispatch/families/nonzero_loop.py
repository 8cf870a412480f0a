"""Family: a loop over the experts, or the hit ones, whose tokens are picked by a mask.

    for e in (one_hot(idx).sum((0, 1)) > 0).nonzero(): slot, token = torch.where(mask[e]) ... out.index_add_(...)
    for e, expert in enumerate(self.experts): token, slot = torch.where(idx == e); if token.numel(): ...

Seen in DSMoE, JiT, ProMoE and Hugging Face transformers: as a method, as the forward of the experts' own module, or
inside the forward that also holds the router.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moeca_compile.expert_dispatch.families.family import Family, method_or_loop
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.proof.candidate import Proposal
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.layouts import FLAT, PAIRED
from moeca_compile.expert_dispatch.source.loop import MASKED, Loop


class NonzeroLoop(Family):
    """One mask per expert."""

    name = "nonzero_loop"

    def match(self, code: ModuleCode) -> Iterable[Loop]:
        return [loop for loop in code.loops if loop.evidence & MASKED]

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Proposal]:
        return method_or_loop(harness, loop, PAIRED + FLAT)
