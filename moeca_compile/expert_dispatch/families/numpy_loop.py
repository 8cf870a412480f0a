"""Family: tokens sorted by expert, counts read back to the host, one contiguous segment per expert.

    counts = ids.bincount().cpu().numpy().cumsum(0)
    for i, end in enumerate(counts): ... self.experts[i](x[rows]) ... out.scatter_reduce_(...)

Seen in DiT-MoE, HiDream, TC-DiT and DeepSeek's reference code, mostly as a method that takes flat ids and weights.
"""

from __future__ import annotations

from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.method import FLAT, PAIRED
from moeca_compile.expert_dispatch.source.loop import SORTED

FAMILY = Family("numpy_loop", SORTED, FLAT + PAIRED)
