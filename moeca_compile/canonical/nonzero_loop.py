"""Family: a loop over the experts, or the hit ones, whose tokens are picked by a mask.

    for e in (one_hot(idx).sum((0, 1)) > 0).nonzero(): slot, token = torch.where(mask[e]) ... out.index_add_(...)
    for e, expert in enumerate(self.experts): token, slot = torch.where(idx == e); if token.numel(): ...

Seen in DSMoE, JiT, ProMoE and Hugging Face transformers: as a method, as the forward of the experts' own module, or
inside the forward that also holds the router.
"""

from __future__ import annotations

from moeca_compile.canonical import inline, method
from moeca_compile.canonical.attempt import Proposal, Stand
from moeca_compile.canonical.dispatch import MASKED, Loop

NAME = "nonzero_loop"


def claims(loop: Loop) -> bool:
    return bool(loop.evidence & MASKED)


def propose(stand: Stand, loop: Loop) -> Proposal | str | None:
    """The rewritten method, why there is none, or None where inference doesn't reach the loop."""
    return inline.whole_or_loop(stand, loop, method.PAIRED + method.FLAT)
