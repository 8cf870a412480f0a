"""Weights fitted again, to what the model returns on the way that they lead.

The first fit takes outputs from the wanted trajectories. A schedule's latents are a little off these, and there the
model returns something else. So the fitted schedule runs, what the model returns is kept, and the weights are fitted to
that; once more as long as rollouts on seeds that aren't fitted to get better. Source of the idea: Ross, Gordon &
Bagnell, A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning, AISTATS 2011.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeca_compile.planner.output.gram import Gram, gram_of, summed
from moeca_compile.planner.output.paths import Path, record_path
from moeca_compile.planner.output.study import OutputStudy, psnr_to_wanted
from moeca_compile.schedule import Schedule

ROUNDS = 2


def refit(
    study: OutputStudy, checking: Sequence[int], start: Schedule, quality: float, fitted: Callable[[Gram], Schedule]
) -> tuple[float, Schedule, Gram | None]:  # fmt: skip
    """What the weights of a plan are best fitted to.

    Args:
        study: has sampled its seeds.
        checking: the seeds that weights aren't fitted to, unless those are all.
        start: the plan's schedule, fitted to the other seeds' wanted trajectories.
        quality: of `start` on the checking seeds, mean PSNR in dB.
        fitted: to inner products -> the plan's schedule.

    Returns:
        The best quality, the schedule that has it, and the inner products, of all seeds, whose other seeds' share
        gave it. None: the wanted trajectories' do.
    """
    seeds, wanted = study.request.seeds, study.wanted
    best: Schedule = start
    found: Gram | None = None
    fitting = [seed for seed in seeds if seed not in checking] or seeds
    paths = _paths(study, seeds, start)
    for left in reversed(range(ROUNDS)):
        grams = {seed: gram_of(path, wanted[seed].states) for seed, path in paths.items()}
        schedule = fitted(summed([grams[seed] for seed in fitting]))
        paths = _paths(study, seeds if left else checking, schedule)
        reached = psnr_to_wanted(study, ((seed, paths[seed].samples) for seed in checking))
        if reached <= quality:
            break
        quality, best, found = reached, schedule, summed([grams[seed] for seed in seeds])
    return quality, best, found


def _paths(study: OutputStudy, seeds: Sequence[int], schedule: Schedule) -> dict[int, Path]:
    return {seed: record_path(study.sampled, seed, schedule) for seed in seeds}
