"""Family: tokens sorted by expert, counts read back to the host, one contiguous segment per expert.

    counts = ids.bincount().cpu().numpy().cumsum(0)
    for i, end in enumerate(counts): ... self.experts[i](x[rows]) ... out.scatter_reduce_(...)

Seen in DiT-MoE, HiDream, TC-DiT and DeepSeek's reference code, mostly as a method that takes flat ids and weights.
"""

from __future__ import annotations

from moeca_compile.canonical import inline, method
from moeca_compile.canonical.attempt import Proposal, Stand
from moeca_compile.canonical.dispatch import SORTED, Loop

NAME = "numpy_loop"


def claims(loop: Loop) -> bool:
    return bool(loop.evidence & SORTED)


def propose(stand: Stand, loop: Loop) -> Proposal | str | None:
    """The rewritten method, why there is none, or None where inference doesn't reach the loop."""
    return inline.whole_or_loop(stand, loop, method.FLAT + method.PAIRED)
