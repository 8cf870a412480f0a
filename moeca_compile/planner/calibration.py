"""`calibrate`: a budget in, a schedule out, found on the user's own model, sampler and machine.

Sample the seeds uncached (the truth), measure how far forecasts are off, then search: propose by estimate, decide by
sampling. What is found is sampled once more with seeds that the search hasn't seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeca_compile.errors import CaptureError
from moeca_compile.inspect.progress import bar
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.search.rows import PARTIAL, Plan, schedule_of
from moeca_compile.planner.search.search import RACE_SEEDS, Search
from moeca_compile.planner.study import Study
from moeca_compile.planner.thin import Thinned, thinned
from moeca_compile.schedule import Schedule


def calibrate(
    model: Any,
    sample: Sampler,
    *,
    budget: str,
    order: int | str = "auto",
    granularity: str = "auto",
    max_variants: int = 4,
    seeds: Sequence[int] | int = 4,
    holdout: Sequence[int] | int = 2,
    effort: float | None = None,
    data_range: float | None = None,
    inner: str = "inductor",
    resume: str | Path | None = None,
    memory: int = 2**30,
    perturb: int = 0,
    branches: float = 0.0,
    progress: bool = True,
) -> Schedule:
    """Find the best schedule that a budget allows.

    Args:
        model: as `moeca_compile.compile` takes it; its weights are only read. While a pipeline is sampled, the compiled
            transformer is set on it: `sample` may call the pipeline.
        sample: the user's own loop: `sample(model, seed)` returns the final samples, deterministic in `seed`.
        budget: `macs:0.26` (fraction of the uncached multiply-accumulates), `latency:0.4` (of the uncached time of
            the variants, measured here), `speedup:2` (the same as `latency:0.5`), `psnr:45` (the cheapest that holds
            it), and `state:64MiB` beside them; several with commas between.
        order: of the forecasts: 0, 1, 2, or `auto`: whichever wins.
        granularity: what the schedule's columns are, as in `Options`; `auto`: `region`, or `stack` if that wins or if
            the state of `region` doesn't fit. The schedule says which, and compiling with another one is refused.
        max_variants: distinct rows allowed, at least 2; above 2 partial rows are tried.
        seeds: what the search sees; a number n is short for 0 to n - 1. 8 to 16 seeds are better than 4: a schedule can
            be made to measure for a few samples.
        holdout: what only the final check sees; a number n is short for 1000 to 999 + n, and 0 leaves the check out. No
            seed is in both.
        effort: what the search may sample, in uncached trajectories; default 1.25 a seed. The last round
            comes on top.
        data_range: of the samples, for the PSNR; None: what the uncached samples span.
        inner: `inductor` or `eager`, as in `Options`.
        resume: a folder that keeps what was found, so that an interrupted calibration goes on where it was, and
            another budget or order reuses it.
        memory: bytes of region outputs held at once while measuring; more go to a temporary folder.
        perturb: how many experts to make stale, one by one, on the first seed, to see what the sample suffers: those
            that drift most first. Each costs about two uncached trajectories. Kept in `resume`; `moeca drift` shows it.
        branches: 0, or which share of the branches (token, expert) a row computes that doesn't compute the experts, as
            `Partial(0, branches)`; 0.02 to 0.05 holds the transitions. Schedules of such rows are searched beside those
            of whole regions, for about as much again, and returned if they are better. With a budget of MACs the best
            of them is then thinned where that makes it better: some layers cached as whole regions, some cheap steps
            without branches computed. Bundles can't hold them yet.
        progress: show a progress bar where `rich` is installed.

    Returns:
        A closed schedule, one row a step, with the timesteps it was made for where these go one way. `predicted`
        holds `mac_fraction`, `state_bytes`, `psnr_db` (mean over the samples of the search's seeds),
        `psnr_db_holdout`, `trajectories` (what calibrating cost, in uncached ones, without compiling), and of each
        family of schedules the best PSNR that it reached on the seeds it got to (`tried uniform order-2`, ...).

    Raises:
        ScheduleError: a budget that can't be read or kept (with the nearest that can), seeds in both sets or twice, a
            sampler that isn't deterministic, never calls the model, ignores its seed or gives NaN, a `resume` folder
            of something else.
        CaptureError: the model can't be captured, or holds nothing to cache.
    """
    request = Request.read(
        budget, order, max_variants, seeds, holdout, effort, data_range, memory, resume, perturb, branches
    )
    try:
        with bar(progress) as tick:

            def study_of(granularity: str) -> Study:
                return Study(model, sample, granularity, inner, request, tick)

            return _schedule(_auto(study_of, request) if granularity == "auto" else _search(study_of(granularity)))
    except KeyboardInterrupt as stop:
        if request.folder is not None:
            stop.add_note(f"what was found so far is in {str(request.folder)!r}: the same call goes on from there")
        raise


@dataclass(frozen=True)
class _Found:
    study: Study
    plan: Plan
    search: Search
    thinned: Thinned | None = None  # of the plan

    @property
    def quality(self) -> float:
        if self.thinned is not None:
            return self.thinned.quality
        return self.search.race.quality(self.plan, len(self.study.request.seeds))


def _search(study: Study, branches: bool = True) -> _Found:
    study.sample_uncached()
    if study.request.perturb:
        study.make_stale()
    found = _Found(study, *study.search())
    return _by_branches(found) if branches and study.request.branches else found


def _by_branches(found: _Found) -> _Found:
    """What was found, or a schedule that computes some branches in its cheap rows, if that is better."""
    study = found.study.by_branches()
    other = _Found(study, *study.search())
    limits = study.request.budget
    if limits.psnr_db is None and limits.latency is None and other.plan.caches:
        thin = thinned(study, other.plan)
        other.search.family_quality |= {
            f"{other.plan.predictor}, {way}": quality for way, quality in thin.tried.items()
        }
        if thin.ways:
            other = replace(other, thinned=thin)
    found.search.family_quality |= {
        f"branches, {name}": quality for name, quality in other.search.family_quality.items()
    }
    other.search.family_quality = found.search.family_quality
    found.study.count("branches", study)
    if found.study.request.budget.psnr_db is not None:
        better = study.costs.fraction(other.plan) < found.study.costs.fraction(found.plan)
    else:
        better = other.quality > found.quality
    if not better:
        return found
    study.seconds = found.study.seconds
    return other


def _auto(study_of: Callable[[str], Study], request: Request) -> _Found:
    """Regions; or the whole stack, where only its state fits or where the plan that won is better with it."""
    regions = study_of("region")
    limit = request.budget.state_bytes
    if limit is not None:
        regions.sampled.run(request.seeds[0])
        # by branches there is more state, not less
        if limit < min(regions.costs.state_bytes.values()):
            return _search(study_of("stack"), branches=False)
    found = _search(regions)
    limited = limit is not None or request.budget.latency is not None
    if limited or found.study is not regions or not found.plan.caches or found.plan.partial:
        return found
    stack = study_of("stack")
    try:
        stack.borrow(regions)
    except CaptureError:  # no blocks that follow each other: nothing to try
        return found
    race, raced = stack.race(), min(RACE_SEEDS, len(request.seeds))
    tried = race.run(found.plan, raced)
    found.search.family_quality["stack, the same plan"] = tried
    regions.count("stack", stack)
    if tried <= found.search.race.quality(found.plan, raced) or not stack.costs.allows(found.plan, request.budget):
        return found
    if race.run(found.plan, len(request.seeds)) <= found.quality:
        return found
    found.search.race = race
    return replace(found, study=stack)


def _schedule(found: _Found) -> Schedule:
    """The schedule, with what is expected of it and how it came about."""
    study, plan, request = found.study, found.plan, found.study.request
    predicted = {
        "mac_fraction": study.costs.fraction(plan),
        "state_bytes": float(study.costs.state_of(plan)),
        "psnr_db": found.quality,
    }
    if found.thinned is not None:
        predicted |= {"mac_fraction": found.thinned.mac_fraction, "state_bytes": float(found.thinned.state_bytes)}
    if study.costs.ms:
        predicted["latency_fraction"] = study.costs.fraction(plan, "ms")
    held_out = study.held_out(plan if found.thinned is None else found.thinned.schedule)
    if held_out is not None:
        predicted["psnr_db_holdout"] = held_out
    predicted["trajectories"] = sum(study.seconds.values()) / study.uncached
    tried = sorted(found.search.family_quality.items())
    predicted |= {f"tried {name}": quality for name, quality in tried if math.isfinite(quality)}
    rows = "".join(f", {letter}: {PARTIAL[letter].description}" for letter in sorted(plan.partial))
    order = f"{plan.predictor}, granularity {study.granularity}{rows}"
    if study.sampled.by_branches:
        order += f", {request.branches:g} of the branches in every cheap row"
    if found.thinned is not None:
        order += "".join(f", {way}" for way in found.thinned.ways)
    made_by = f"calibrated for {request.text} on {len(request.seeds)} seeds: {order}"
    program = study.sampled.program
    schedule = schedule_of(plan, program.regions.keys, study.sampled.kinds)
    return replace(
        schedule if found.thinned is None else found.thinned.schedule,
        made_by=made_by,
        fingerprint=program.regions.fingerprint,
        granularity=study.granularity,
        timesteps=study.timesteps,
        predicted=predicted,
    )
