"""Estimates where the samples should be near a truth that the uncached run itself is off.

Estimates are of the distance from the uncached samples. Without this, plans whose distances from the truth are all but
equal would look decibels apart, and the search would roll out many of them to learn how far its estimates err.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from moeca_compile.planner.search.rows import Plan


@dataclass(frozen=True)
class Floor:
    """The error that no cache causes. It adds to a cache's error as if the two were independent.

    Attributes:
        quality: of the uncached samples to the truth, dB.
        to_uncached: the quality of a plan that was rolled out to the uncached samples, dB.
    """

    quality: float
    to_uncached: Callable[[Plan], float]

    def expected(self, estimate: float, known: Collection[Plan], estimate_of: Callable[[Plan], float]) -> float:
        """The estimated quality to the truth, dB.

        Args:
            estimate: of the quality to the uncached samples, dB up to a constant.
            known: plans that were rolled out; the first one that caches gives the constant.
            estimate_of: their estimates.
        """
        first = next((plan for plan in known if plan.caches), None)
        if first is None or not math.isfinite(estimate):
            return estimate
        quality = estimate + self.to_uncached(first) - estimate_of(first)
        return -10 * math.log10(10 ** (-quality / 10) + 10 ** (-self.quality / 10))
