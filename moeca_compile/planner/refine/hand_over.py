"""Two models of one loop: is the second one better off with what the first one kept, or cold? A rollout tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import FULL, Plan
from moeca_compile.planner.study import Study


@dataclass(frozen=True)
class HandedOver:
    """A plan with the state handed over: mean PSNR in dB, as that of the plan that starts cold.

    Attributes:
        quality: on the seeds of the search.
        holdout: on the held-out seeds; None: there are none.
    """

    quality: float
    holdout: float | None


def handed_over(study: Study, plan: Plan) -> HandedOver | None:
    """Roll a plan out with the state handed over. The step at which the other model takes over is computed all the
    same, so the cost is that of starting cold.

    Returns:
        The quality; None: there is one model, or the plan caches nothing.
    """
    full = study.costs.full_steps
    if not full or not plan.caches:
        return None
    plan = replace(plan, letters="".join(FULL if step in full else one for step, one in enumerate(plan.letters)))
    before = study.sampled.seconds

    def quality_on(seeds: Sequence[int]) -> float:
        runs = ((seed, study.sampled.run(seed, plan, hands_over=True)) for seed in seeds)
        return mean_psnr([study.errors(seed, samples) for seed, samples in runs], study.data_range)

    found = HandedOver(
        quality_on(study.request.seeds), quality_on(study.request.holdout) if study.request.holdout else None
    )
    study.spend("hand over", study.sampled.seconds - before)
    return found
