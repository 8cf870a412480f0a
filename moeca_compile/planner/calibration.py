"""`calibrate`: find a schedule within a budget for the caller's own model, sampler and machine.

It samples the seeds uncached, measures the errors of forecasts, and searches: estimates propose plans, and rollouts
decide. The resulting schedule is rolled out once more on held-out seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeca_compile.errors import CaptureError, OptionError
from moeca_compile.frontend.model_arguments import models_of
from moeca_compile.frontend.prompts import Prompt, check_seeds, sampler_of
from moeca_compile.inspect.progress import ProgressCallback, bar, tell
from moeca_compile.planner.drift.perturb import perturb_experts
from moeca_compile.planner.output.rule import with_output_rule
from moeca_compile.planner.output.study import OutputStudy
from moeca_compile.planner.price import price_of
from moeca_compile.planner.quality import QualityFunction
from moeca_compile.planner.refine.better import BetterSchedule
from moeca_compile.planner.refine.fitted_regions import with_fitted_weights
from moeca_compile.planner.refine.hand_over import handed_over
from moeca_compile.planner.refine.thin import thinned, with_cached_branches
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.search.rows import PARTIAL, Plan, schedule_of
from moeca_compile.planner.search.search import RACE_SEEDS, Search
from moeca_compile.planner.study import Study
from moeca_compile.planner.truth import Goal, Truth, goal_of, to_both_truths
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.granularity import OUTPUT


def calibrate(
    model: Any,
    sample: Sampler | None = None,
    *,
    budget: str,
    prompts: Sequence[Prompt] | None = None,
    call: Mapping[str, Any] | None = None,
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
    truth: Truth = "uncached",
    quality: QualityFunction | None = None,
    progress: bool = True,
) -> Schedule:
    """Find the best schedule within a budget.

    Args:
        model: as `moeca_compile.compile` takes it; its weights are only read. For a pipeline, the compiled transformer
            is set on it during sampling, so `sample` may call the pipeline. Two transformers of one loop (a list, or a
            pipeline that has them) get one schedule; it computes the step at which the other one takes over. Whether
            that one goes on with the first one's state (`Schedule.hand_over`) or starts cold is measured, by a rollout
            of each at equal cost.
        sample: the caller's own loop: `sample(model, seed)` returns the final samples, deterministic in `seed`. With
            several prompts, it chooses the prompt by the seed. It gets a list of two transformers. With a keyword
            `timesteps` it lets `truth="converged"` choose where its steps lie: it gets a list, one a step, as the model
            receives them. Schedules that are better so have `searched_timesteps`; their users pass `timesteps`, too.
        prompts: for a pipeline, in place of `sample`: texts, or mappings with keywords of the pipeline's call such as
            `prompt_embeds`. Seed s draws prompt s modulo their number, so give at least as many seeds.
        call: further keywords of the pipeline's call, such as `{"num_inference_steps": 28}`.
        budget: `macs:0.26` (fraction of the uncached MACs), `latency:0.4` (fraction of the uncached time of the
            variants, measured on this machine), `speedup:2` (the same as `latency:0.5`) or `psnr:45` (the cheapest
            schedule with at least 45 dB); also `state:64MiB` beside one of them. Separate several by commas.
        order: of the forecasts: 0, 1, 2, or `auto` for the best of them. Then weights are fitted to the measured drift,
            and taken if rollouts find them better (`Schedule.fitted`). With `auto`, and without a limit on state or
            time, these may weigh up to four outputs of a region, else as many as the order does (0: none are fitted).
        granularity: what the columns of the schedule are, as in `Options`. `auto` is `region`, or `stack` if that is
            better or if the state of `region` exceeds the budget. The schedule records its granularity, and compiling
            with another one is an error.
        max_variants: distinct rows of the schedule, at least 2; above 2, partial rows are tried.
        seeds: that the search uses; a number n means 0 to n - 1. With 8 to 16 seeds the schedule overfits less than
            with 4.
        holdout: seeds of the final check alone; a number n means 1000 to 999 + n, and 0 skips the check. No seed may be
            in both sets.
        effort: what the search may sample, in uncached trajectories; default 1.25 per seed. The last round is extra,
            and so is the fit of the output's weights together: its derivatives cost up to twice `effort` in a round,
            its rollouts about half of it; where a round gains 1 dB another one follows, up to three. It is left out
            where `effort` doesn't pay for two seeds.
        data_range: of the samples, for the PSNR; None: the range of the uncached samples.
        inner: `inductor` or `eager`, as in `Options`.
        resume: a folder for the results, so that an interrupted calibration resumes and another budget or order reuses
            them.
        memory: bytes of region outputs in memory at once while measuring; the rest goes to a temporary folder. It also
            limits the derivatives by which the output's weights are fitted together; where these take more, that fit is
            left out with a warning.
        perturb: number of experts to make stale, one at a time, on the first seed, to measure the effect on the sample;
            the experts with the highest drift come first. Each costs about two uncached trajectories. The results are
            stored in `resume`; `moeca drift` shows them.
        branches: fraction of the expert branches, (token, expert) pairs, to compute in rows that do not compute the
            experts region, as `Partial(0, branches)`; 0 disables it. 0.02 to 0.05 covers the transitions. Schedules of
            such rows are searched in addition to those of whole regions, at about the same cost, and returned if they
            are better. With a budget of MACs the best one is then thinned if that improves it: some layers are cached
            as whole regions, or some cheap steps compute no branches. Bundles run these schedules; `fused.onnx` can't
            hold them.
        truth: what the samples should be near. `uncached`: the samples of the model computed at every step. Or samples
            of one's own: a mapping from seeds to tensors [N, ...], a function of the seed, or another model (a module
            or a pipeline; two modules for a loop of two) that `sample` runs as it is, such as the same model before its
            weights were quantized. They are drawn once a seed and kept in `resume`. With granularity `output` the
            samples are fitted to the truth, which may also be `converged`: the samples that the same sampler comes to
            with more and more steps, extrapolated from runs with twice and four times the steps, for which `sample`
            must take a keyword `steps` (six more trajectories a seed, held-out ones too). If it also takes `timesteps`,
            these are searched, which costs a few trajectories in all. A schedule fitted to anything but `uncached` also
            corrects the error of the solver's own steps, so its samples differ from the uncached ones. Steps and terms
            are chosen by weights fitted to three of four seeds. With other granularities nothing is fitted to it: the
            search compares its rollouts with the truth, and `psnr:` in a budget limits the PSNR to it.
        quality: what the rollouts compare plans by, in place of the PSNR: a function (samples, wanted) -> one number a
            sample, higher is better; both are float32 tensors on the CPU. The search takes differences of 0.5 for
            small, as they are in dB, so scale it (10 times the logarithm of a distance, for example). Then `psnr:` in a
            budget limits this quality, and `predicted` has it under `quality` in place of `psnr_db`. The weights of
            granularity `output` are fitted to the least squared error all the same; only choices go by the quality.
        progress: say before sampling what it may cost, in uncached trajectories, and show a progress bar if `rich` is
            installed.

    Returns:
        A schedule with one row per step and without repeats, and with the timesteps of the sampler if they strictly
        rise or fall. `predicted` has `mac_fraction`, `state_bytes`, `psnr_db` (dB, mean over the samples of the
        search's seeds), `psnr_db_holdout`, `latency_fraction` (with a latency budget), `trajectories` (the cost of the
        calibration, in uncached trajectories, without compiling), and for each family of schedules the best PSNR that
        it reached on the seeds it ran on (`tried uniform order-2`, ...; `tried own timesteps` and `tried searched
        timesteps` are to the converged samples; `tried fitted step by step` and `tried fitted together` to the truth,
        on the seeds that both are fitted to, the latter seed by seed without its share in the last step). With a
        `truth` of one's own, `psnr_db` and `psnr_db_holdout` stay those to the uncached samples; `psnr_db_given` and
        `psnr_db_given_holdout` are those to the truth, `uncached_psnr_db_given` and `uncached_psnr_db_given_holdout`
        those of the uncached run to it, and the `tried` ones are to the truth. (Granularity `output` has those of the
        held-out seeds alone.)

    Raises:
        ScheduleError: the budget can't be read, or no schedule fits it (the message gives the nearest budget that one
            fits); a seed is in both sets or twice; the sampler is not deterministic, never calls the model, ignores its
            seed or returns NaN; or the `resume` folder belongs to another calibration.
        CaptureError: the model can't be captured, or has nothing to cache.
        OptionError: both or none of `sample` and `prompts`, prompts that are no list or more than there are seeds, or
            keywords that the pipeline's call doesn't take.
    """
    sample = sampler_of(model, sample, prompts, call, "calibrate")
    request = Request.read(
        budget, order, max_variants, seeds, holdout, effort, data_range, memory, resume, perturb, branches, quality
    )
    goal = goal_of(truth, model, sample, request, granularity)
    if progress:
        tell(price_of([request], granularity, goal, sample).line("calibrate", request.folder is not None))
    with reported(request, progress) as report_progress:
        return find_schedule(Studies(model, sample, inner, goal, report_progress), request, granularity)


@contextmanager
def reported(request: Request, progress: bool) -> Iterator[ProgressCallback]:
    """A progress bar around the searches; an interrupt says where the results are."""
    try:
        with bar(progress) as report_progress:
            yield report_progress
    except KeyboardInterrupt as stop:
        if request.folder is not None:
            stop.add_note(f"what was found so far is in {str(request.folder)!r}: the same call goes on from there")
        raise


@dataclass
class Studies:
    """The studies of one model and sampler, one per granularity. They are shared by the searches for several budgets.

    Attributes:
        model, sample, inner: as for `calibrate`.
        goal: its `truth`, as `goal_of` gives it.
        report_progress: called with what is being done and the fraction done.
        by_granularity: the studies so far.
    """

    model: Any
    sample: Sampler
    inner: str
    goal: Goal
    report_progress: ProgressCallback
    by_granularity: dict[str, Study] = field(default_factory=dict)

    def of(self, granularity: str, request: Request) -> Study:
        """The study of a granularity, which from now on searches for a request."""
        if granularity in self.by_granularity:
            self.by_granularity[granularity].request = request
        elif granularity == OUTPUT:
            if (count := len(models_of(self.model, "calibrate"))) > 1:
                raise OptionError(
                    f"calibrate: granularity='output' fits what one model returns, and there are {count} here. Take "
                    "another granularity, such as 'region' or 'stack'"
                )
            self.by_granularity[granularity] = OutputStudy(
                self.model, self.sample, granularity, self.inner, request, self.report_progress, goal=self.goal
            )
        else:
            self.by_granularity[granularity] = Study(
                self.model, self.sample, granularity, self.inner, request, self.report_progress, goal=self.goal
            )
        return self.by_granularity[granularity]


def find_schedule(studies: Studies, request: Request, granularity: str) -> Schedule:
    """The best schedule for a request, as `calibrate` describes it."""
    check_seeds(studies.sample, len(request.seeds), "calibrate")

    def study_of(granularity: str) -> Study:
        return studies.of(granularity, request)

    result = _best_granularity(study_of, request) if granularity == "auto" else _search(study_of(granularity))
    if not isinstance(result.study, OutputStudy):
        result = _or_with_fitted_weights(result)
    schedule = _schedule(result)
    if isinstance(result.study, OutputStudy):
        schedule = with_output_rule(result.study, schedule, result.plan, result.search.race.errors)
    if request.quality is None:
        return schedule
    return replace(
        schedule, predicted={key.replace("psnr_db", "quality"): value for key, value in schedule.predicted.items()}
    )


@dataclass(frozen=True)
class _Result:
    """The best plan of a study, its search and, if fitted weights or thinning improved it, the improved schedule."""

    study: Study
    plan: Plan
    search: Search
    better: BetterSchedule | None = None

    @property
    def quality(self) -> float:
        """Mean PSNR on all seeds, dB."""
        if self.better is not None:
            return self.better.quality
        return self.search.race.quality(self.plan, len(self.study.request.seeds))


def _search(study: Study, branches: bool = True) -> _Result:
    """The best plan of one study; `branches`: try to cache branches too, if the request asks for it."""
    study.sample_uncached()
    if study.request.perturb:
        perturb_experts(study)
    result = _Result(study, *study.search())
    return _or_with_branches(result) if branches and study.request.branches else result


def _or_with_branches(regions: _Result) -> _Result:
    """The result for whole regions, or one that computes some branches in its cheap rows, whichever is better."""
    study = with_cached_branches(regions.study)
    branches = _Result(study, *study.search())
    budget = study.request.budget
    if budget.psnr_db is None and budget.latency is None and branches.plan.caches:
        thin = thinned(study, branches.plan)
        branches.search.family_quality |= {
            f"{branches.plan.predictor}, {way}": quality for way, quality in thin.tried.items()
        }
        if thin.ways:
            branches = replace(branches, better=thin)
    families = {f"branches, {name}": quality for name, quality in branches.search.family_quality.items()}
    regions.search.family_quality |= families
    branches.search.family_quality = regions.search.family_quality
    regions.study.count("branches", study)
    if budget.psnr_db is not None:
        better = study.costs.fraction(branches.plan) < regions.study.costs.fraction(regions.plan)
    else:
        better = branches.quality > regions.quality
    if not better:
        return regions
    study.seconds = regions.study.seconds
    return branches


def _or_with_fitted_weights(result: _Result) -> _Result:
    """The result with fitted weights in its forecasts of whole regions, if these are better."""
    study = result.study
    if result.better is not None or study.sampled.caches_branches or not study.has_drift:
        return result
    better = with_fitted_weights(study, result.plan, result.quality, result.search.race.errors)
    if better is None:
        return result
    result.search.family_quality |= better.tried
    return replace(result, better=better) if better.ways else result


def _best_granularity(study_of: Callable[[str], Study], request: Request) -> _Result:
    """The result for `region`, or for `stack` if only its state fits or if the best plan is better with it."""
    regions = study_of("region")
    limit = request.budget.state_bytes
    if limit is not None:
        regions.sampled.run(request.seeds[0])
        # caching branches needs more state than caching regions, not less
        if limit < min(regions.costs.state_bytes.values()):
            return _search(study_of("stack"), branches=False)
    result = _search(regions)
    limited = limit is not None or request.budget.latency is not None
    if limited or result.study is not regions or not result.plan.caches or result.plan.partial:
        return result
    stack = study_of("stack")
    try:
        stack.borrow(regions)
    except CaptureError:  # the model has no consecutive blocks
        return result
    race, seeds = stack.race(), min(RACE_SEEDS, len(request.seeds))
    stack_quality = race.run(result.plan, seeds)
    result.search.family_quality["stack, the same plan"] = stack_quality
    regions.count("stack", stack)
    if stack_quality <= result.search.race.quality(result.plan, seeds):
        return result
    if not stack.costs.allows(result.plan, request.budget):
        return result
    if race.run(result.plan, len(request.seeds)) <= result.quality:
        return result
    result.search.race = race
    return replace(result, study=stack)


def _schedule(result: _Result) -> Schedule:
    """The schedule of a result, with its predicted figures and a text that says how it was made."""
    study, plan, request, program = result.study, result.plan, result.study.request, result.study.sampled.program
    if result.better is None:
        schedule = schedule_of(plan, program.regions.keys, study.sampled.kinds)
    else:
        schedule = result.better.schedule
    handed = handed_over(study, plan) if result.better is None else None
    if study.costs.full_steps:
        rows = tuple(schedule.rows[0 if i in study.costs.full_steps else i] for i in range(len(schedule.rows)))
        schedule = replace(schedule, rows=rows)
    letters = "".join(f", {letter}: {PARTIAL[letter].description}" for letter in sorted(plan.partial))
    method = f"{plan.predictor}, granularity {study.granularity}{letters}"
    if study.sampled.caches_branches:
        method += f", {request.branches:g} of the branches in every cheap row"
    if result.better is not None:
        method += "".join(f", {way}" for way in result.better.ways)
    predicted = _predicted(result)
    if handed is not None:
        cold = predicted["psnr_db"]
        predicted |= {"tried hand_over": handed.quality, "tried cold start": cold}
        if handed.quality > cold:
            schedule, predicted["psnr_db"] = replace(schedule, hand_over=True), handed.quality
            predicted |= {} if handed.holdout is None else {"psnr_db_holdout": handed.holdout}
        method += (
            f", {'handed over' if handed.quality > cold else 'cold start'} ({handed.quality:.1f} and {cold:.1f} dB)"
        )
    if study.target.is_given:
        method += ", nearest to given samples"
        whole = result.better is None and not schedule.hand_over and plan.caches
        predicted = to_both_truths(study, plan if whole else None, schedule, predicted)
    return replace(
        schedule,
        made_by=f"calibrated for {request.text} on {len(request.seeds)} seeds: {method}",
        fingerprint=program.regions.fingerprint,
        granularity=study.granularity,
        timesteps=study.timesteps,
        latent=program.latent_shape,
        predicted=predicted,
    )


def _predicted(result: _Result) -> dict[str, float]:
    """The figures of a result, by name; `calibrate` describes them."""
    study, plan = result.study, result.plan
    predicted = {
        "mac_fraction": study.costs.fraction(plan),
        "state_bytes": float(study.costs.state_of(plan)),
        "psnr_db": result.quality,
    }
    if result.better is not None:
        predicted |= {"mac_fraction": result.better.mac_fraction, "state_bytes": float(result.better.state_bytes)}
    if study.costs.ms:
        predicted["latency_fraction"] = study.costs.fraction(plan, "ms")
    better = result.better
    holdout_quality = study.held_out(plan) if better is None else study.held_out(better.kept_as, better.schedule)
    if holdout_quality is not None:
        predicted["psnr_db_holdout"] = holdout_quality
    predicted["trajectories"] = study.trajectories
    families = sorted(result.search.family_quality.items())
    return predicted | {f"tried {name}": quality for name, quality in families if math.isfinite(quality)}
