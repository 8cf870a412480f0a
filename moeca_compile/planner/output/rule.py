"""The last part of a calibration with granularity `output`: the plan's weights fitted, and what they give measured.

Fits propose which steps compute the model and which terms are weighed; rollouts decide. Weights are fitted to three of
four seeds, and the others decide about steps and terms. The last fit takes all seeds, and at the end the weights of all
computed steps are fitted together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moeca_compile.planner.output.fit import RESPONSES, Form, OutputFit, term_sets
from moeca_compile.planner.output.gram import Gram, Grams, summed
from moeca_compile.planner.output.place import computed_steps, placements
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.planner.output.study import OutputStudy, psnr_to_wanted
from moeca_compile.planner.output.times import Fine, placed
from moeca_compile.planner.output.together import FittedTogether, fit_together
from moeca_compile.planner.search.anneal import neighbors
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import FULL, NONE, Plan, schedule_of
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.output import UNCACHED, OutputRule

PLANS = 3  # of the search's others, and as many annealed ones
EFFORT = 4.0  # uncached trajectories for plans one move away from the best
CHECKED = 4  # one seed in so many isn't fitted to


@dataclass(frozen=True)
class Grid:
    """Where the sampler's steps lie, and what a fit there takes.

    Attributes:
        sampler: the update of each step.
        grams: with the outputs and the wanted latents of all steps.
        timesteps: that the sampler is given; empty: its own.
    """

    sampler: Sequence[SamplerStep]
    grams: Grams
    timesteps: tuple[float, ...] = ()

    @property
    def fit(self) -> OutputFit:
        """Of this sampler."""
        return OutputFit(self.sampler)

    def miss(self, plan: Plan, form: Form) -> float:
        """The mean square error of a plan's samples on the trajectories that weights aren't fitted to."""
        return self.grams.checked.square(self.fit.fit(self.grams.fitted, computed_steps(plan), form).miss)


class OutputRuleSearch:
    """Fits the weights of one study.

    Args:
        study: has sampled its seeds.
        raced: the plans that the search rolled out, each with the mean squared errors of its samples by seed.
    """

    def __init__(self, study: OutputStudy, raced: Mapping[Plan, Mapping[int, Sequence[float]]]) -> None:
        self.raced = raced
        self.study, seeds, wanted = study, study.request.seeds, study.wanted
        count = max(1, len(seeds) - len(seeds) // CHECKED)
        self.checking = seeds[count:] or seeds
        first, sets = wanted[seeds[0]], (seeds[:count], self.checking, seeds)
        self.own = Grid(study.sampler(), Grams(*(summed([wanted[seed].gram for seed in some]) for some in sets)))
        self.fine: Fine | None = None
        if study.searches_times:
            fine = {seed: gram for seed in seeds if (gram := wanted[seed].fine)}
            grams = Grams(*(summed([fine[seed] for seed in some]) for some in sets))
            self.fine = Fine(grams, first.fine_timesteps, first.parts)
        self.tried: dict[str, float] = {}
        self.is_batched = first.is_batched
        self.term_sets = term_sets(self.is_batched)
        self.response = RESPONSES[0]
        self.qualities: dict[tuple[Plan, float, tuple[float, ...]], float] = {}

    def best(self, schedule: Schedule, plan: Plan) -> Schedule:
        """The best fitted schedule with no more computed steps than a plan.

        Args:
            schedule: of the plan, for everything but its rows and weights.
            plan: of the search.
        """
        self._choose_response(schedule, plan)
        if not plan.caches:
            return self._schedule(schedule, plan, self.own, self.own.grams.all)
        self.study.report_progress("steps for fitted weights", 0.9)
        grams = self.own.grams
        plans = [
            plan,
            *self._raced(plan),
            *placements(self.own.fit, grams.fitted, grams.checked, self._form(plan), plan, PLANS),
        ]
        best = max(dict.fromkeys(plans), key=lambda candidate: self._quality(schedule, candidate))
        improved = self._improved(schedule, best)
        plan, grid = self._moved(schedule, improved)
        start, found = self._fitted_together(schedule, plan, grid)
        if grid.timesteps and found is not None:
            # few seeds chose these timesteps; the fits to all of them decide
            _, own = self._fitted_together(schedule, improved, self.own)
            if own is not None and own.seeds == found.seeds:
                self.tried |= {"tried own timesteps": own.quality, "tried searched timesteps": found.quality}
                found = max(own, found, key=lambda one: one.quality)
        if found is None:
            return start
        self.tried |= {"tried fitted step by step": found.before, "tried fitted together": found.reached}
        return found.schedule

    def _fitted_together(self, schedule: Schedule, plan: Plan, grid: Grid) -> tuple[Schedule, FittedTogether | None]:
        """The schedule of a plan, fitted step by step to all seeds, and what fitting its weights together gives."""
        start = self._schedule(schedule, plan, grid, grid.grams.all)
        self.study.report_progress("all weights fitted together", 0.97)
        return start, fit_together(self.study, grid.sampler, start)

    def _raced(self, plan: Plan) -> list[Plan]:
        """The best other plans that the search rolled out, with no more computed steps than a plan."""
        limit, errors = plan.letters.count(FULL), self.raced
        plans = [other for other in errors if other.letters.count(FULL) <= limit and other.letters != plan.letters]
        plans.sort(key=lambda other: mean_psnr(errors[other].values(), self.study.data_range), reverse=True)
        letters = dict.fromkeys(other.letters for other in plans)  # weights take the place of the predictor
        return [Plan(text, plan.predictor) for text in letters][:PLANS]

    def _improved(self, schedule: Schedule, plan: Plan) -> Plan:
        """The best of a plan and those one move away that the fits promise most of, by rollouts."""
        computed = plan.letters.count(FULL)
        near = [other for other in neighbors(plan, (FULL, NONE)) if other.letters.count(FULL) <= computed]
        form = self._form(plan)
        near.sort(key=lambda other: self.own.miss(other, form))
        cost = len(self.checking) * computed / len(plan.letters)
        return max([plan, *near[: round(EFFORT / cost)]], key=lambda other: self._quality(schedule, other))

    def _moved(self, schedule: Schedule, plan: Plan) -> tuple[Plan, Grid]:
        """A plan and where its steps lie: at other timesteps if rollouts there are better."""
        if self.fine is None:
            return plan, self.own
        self.study.report_progress("timesteps for fitted weights", 0.95)
        found = [(plan, self.own)]
        for placement in placed(self.fine, self.own.sampler, self._form(plan), plan, PLANS):
            timesteps = tuple(self.fine.timesteps[step] for step in placement.steps)
            grid = Grid(self.study.sampler_at(timesteps), self.fine.at(placement.steps), timesteps)
            found.append((Plan(placement.letters, plan.predictor), grid))
        qualities = [self._quality(schedule, *candidate) for candidate in found]
        self.tried |= {"tried own timesteps": qualities[0], "tried searched timesteps": max(qualities[1:])}
        return max(zip(qualities, found, strict=True), key=lambda pair: pair[0])[1]

    def _choose_response(self, schedule: Schedule, plan: Plan) -> None:
        """Choose how much weights are held back, by rollouts of the search's plan."""

        def quality(response: float) -> float:
            self.response = response
            return self._quality(schedule, plan)

        self.response = max(RESPONSES, key=quality)

    def _quality(self, schedule: Schedule, plan: Plan, grid: Grid | None = None) -> float:
        """Mean PSNR to the truth, dB, of the seeds that weren't fitted to, by rollouts."""
        grid = grid or self.own
        study, key = self.study, (plan, self.response, grid.timesteps)
        if key in self.qualities:
            return self.qualities[key]
        candidate = self._schedule(schedule, plan, grid, grid.grams.fitted)
        study.report_progress(f"fitted weights, {plan.letters.count(FULL)} computed steps", 0.95)
        runs = ((seed, study.sampled.run(seed, candidate)) for seed in self.checking)
        self.qualities[key] = psnr_to_wanted(study, runs)
        return self.qualities[key]

    def _schedule(self, schedule: Schedule, plan: Plan, grid: Grid, gram: Gram) -> Schedule:
        """The schedule of a plan, with weights fitted to a gram of a grid."""
        form = self._form(plan, grid)
        weights = grid.fit.fit(gram, computed_steps(plan), form).weights
        plan_rows = schedule_of(plan, schedule.regions or (), self.study.sampled.kinds)
        first = grid.sampler[0]
        # in two calls, no call knows what the other one returned
        is_seen = len(first.now) == 1 or self.is_batched
        update = (first.keep, *first.now) if is_seen else ()
        rule = OutputRule(form.terms, weights, self.study.goal_name, update)
        fitted = replace(schedule, rows=plan_rows.rows, order=plan_rows.order, output=rule)
        return replace(fitted, timesteps=grid.timesteps, searched_timesteps=True) if grid.timesteps else fitted

    def _form(self, plan: Plan, grid: Grid | None = None) -> Form:
        """The terms of the least error on the seeds that weren't fitted to."""
        grid = grid or self.own
        candidates = [Form(terms, self.response) for terms in self.term_sets]
        return min(candidates, key=lambda form: grid.miss(plan, form))


def with_output_rule(
    study: OutputStudy, schedule: Schedule, plan: Plan, raced: Mapping[Plan, Mapping[int, Sequence[float]]]
) -> Schedule:
    """Fit the weights of what the model returns at each step.

    Args:
        study: that found the schedule.
        schedule: of granularity `output`.
        plan: that the schedule was made of.
        raced: the plans that the search rolled out, each with the mean squared errors of its samples by seed.

    Returns:
        The schedule with its weights, and in `predicted` `psnr_db` and `psnr_db_holdout` with them (to `uncached`), the
        same without them as `tried without weights`, and for another truth how far the samples are from it
        (`psnr_db_converged_holdout` or `psnr_db_given_holdout`) and how far the uncached ones are
        (`uncached_psnr_db_..._holdout`). Where the weights don't come nearer to the uncached samples than the
        polynomial does, the schedule as it was, and what they reached as `tried with weights`.
    """
    goal, sampled, seeds, holdout = study.goal_name, study.sampled, study.request.seeds, study.request.holdout
    if goal == UNCACHED and not plan.caches:
        return schedule
    begin = sampled.seconds
    search = OutputRuleSearch(study, raced)
    best = search.best(schedule, plan)
    samples = {seed: sampled.run(seed, best) for seed in seeds}
    predicted = {**schedule.predicted, **search.tried, "tried without weights": schedule.predicted["psnr_db"]}
    predicted["psnr_db"] = mean_psnr((study.errors(seed, samples[seed]) for seed in seeds), study.data_range)
    if goal == UNCACHED and predicted["psnr_db"] <= schedule.predicted["psnr_db"]:
        return replace(schedule, predicted={**schedule.predicted, "tried with weights": predicted["psnr_db"]})
    if holdout:
        predicted |= _held_out(study, best)
    study.spend("weights", sampled.seconds - begin)
    predicted["trajectories"] = study.trajectories
    made_by = f"{schedule.made_by}, weights of the output fitted to {goal} samples"
    if best.searched_timesteps:
        made_by += ", at searched timesteps"
    return replace(best, predicted=predicted, made_by=made_by)


def _held_out(study: OutputStudy, schedule: Schedule) -> dict[str, float]:
    """The quality on held-out seeds, to both truths."""
    goal, holdout, data_range = study.goal_name, study.request.holdout, study.data_range
    samples = {seed: study.sampled.run(seed, schedule) for seed in holdout}
    qualities = {"psnr_db_holdout": mean_psnr((study.errors(seed, samples[seed]) for seed in holdout), data_range)}
    if goal == UNCACHED:
        return qualities
    wanted = {seed: study.wanted_samples(seed) for seed in holdout}
    for name, given in (("", samples), ("uncached_", study.truth)):
        errors = [study.errors_to(wanted[seed], given[seed]) for seed in holdout]
        qualities[f"{name}psnr_db_{goal}_holdout"] = mean_psnr(errors, data_range)
    return qualities
