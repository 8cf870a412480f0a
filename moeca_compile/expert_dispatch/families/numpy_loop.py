"""Family: tokens sorted by expert, counts read back to the host, one contiguous segment per expert.

    counts = ids.bincount().cpu().numpy().cumsum(0)
    for i, end in enumerate(counts): ... self.experts[i](x[rows]) ... out.scatter_reduce_(...)

Seen in DiT-MoE, HiDream, TC-DiT and DeepSeek's reference code, mostly as a method that takes flat ids and weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moeca_compile.expert_dispatch.families.family import Family, method_or_loop
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.proof.candidate import Proposal
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.layouts import FLAT, PAIRED
from moeca_compile.expert_dispatch.source.loop import SORTED, Loop


class NumpyLoop(Family):
    """Sorted segments, with the counts on the host."""

    name = "numpy_loop"

    def match(self, code: ModuleCode) -> Iterable[Loop]:
        return [loop for loop in code.loops if loop.evidence & SORTED]

    def propose(self, harness: Harness, loop: Loop) -> Iterator[Proposal]:
        return method_or_loop(harness, loop, FLAT + PAIRED)
