"""Family: a loop over the experts, or the hit ones, whose tokens are picked by a mask.

    for e in (one_hot(idx).sum((0, 1)) > 0).nonzero(): slot, token = torch.where(mask[e]) ... out.index_add_(...)
    for e, expert in enumerate(self.experts): token, slot = torch.where(idx == e); if token.numel(): ...

Seen in DSMoE, JiT, ProMoE and Hugging Face transformers: as a method, as the forward of the experts' own module, or
inside the forward that also holds the router.
"""

from __future__ import annotations

from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.method import FLAT, PAIRED
from moeca_compile.expert_dispatch.source.loop import MASKED

FAMILY = Family("nonzero_loop", MASKED, PAIRED + FLAT)
