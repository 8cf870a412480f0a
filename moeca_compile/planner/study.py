"""One model under one granularity: its uncached samples, its drift, its costs, and searches over them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from moeca_compile.errors import ScheduleError
from moeca_compile.inspect.progress import ProgressCallback
from moeca_compile.planner.drift.experts import ExpertWatch
from moeca_compile.planner.drift.measure import measure
from moeca_compile.planner.drift.mixing import CallRecording, Mixing, find_mixing
from moeca_compile.planner.drift.stale import PRICE, PerturbationResult, stale_samples
from moeca_compile.planner.latency import costs
from moeca_compile.planner.origin import alike
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Call, SampledModel, Sampler, kinds_of
from moeca_compile.planner.search.cheapest import cheapest
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.drift import Drift, extended
from moeca_compile.planner.search.predict import predictors_of
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import FULL, NONE, PARTIAL, Plan
from moeca_compile.planner.search.search import Search
from moeca_compile.planner.store import Store
from moeca_compile.schedule import Action, Partial, Schedule

LOOKBACK = 20  # steps back that a forecast may rest on, at least
GAPS = 4  # and as many mean gaps between computed steps: an order-2 forecast rests on three of them
MEASURED = 4  # one in so many seeds is measured, two at least
SPLIT = 8  # steps back that partial rows are told apart for, on one seed: each kind of row makes it dearer
WORST = 1e30  # a mean squared error; its PSNR is the least there is
OVERHEAD = 0.06  # of an uncached trajectory: what a run costs beside its computed regions


@dataclass
class Study:
    """See the module; `tick` is told what is being done."""

    model: Any
    sample: Sampler
    granularity: str
    inner: str
    request: Request
    tick: ProgressCallback
    caching: Schedule | None = None  # as in `SampledModel`

    def __post_init__(self) -> None:
        self.sampled = SampledModel(self.model, self.sample, self.granularity, self.inner, self.caching)
        folder = self.request.folder
        name = self.granularity.replace(":", "_")
        if self.caching is not None:
            name += f"_branches_{self.request.branches:g}"
        self.store = Store(None if folder is None else folder / name)
        self.truth: dict[int, torch.Tensor] = {}
        self.seconds: dict[str, float] = {"truth": 0.0, "measure": 0.0, "search": 0.0}
        self.tape = CallRecording()
        self.drift: Drift
        self.split: Drift | None

    # -- the truth --------------------------------------------------------------------------------------------------

    def sample_uncached(self) -> None:
        """Sample all seeds uncached and measure the drift, refusing samplers whose samples say nothing about it."""
        seeds = (*self.request.seeds, *self.request.holdout)
        first = seeds[0]
        self.tick("uncached samples", 0.0)
        self.truth[first] = self._finite(first, self.sampled.run(first))
        self.sampled.uncached.clear()  # it compiled
        again = self.sampled.run(first, watch=self._record)
        if not torch.equal(again, self.truth[first]):
            raise ScheduleError(
                "calibrate: sample(model, seed) gave two results for one seed; it must depend on its seed alone: "
                "draw all noise from a generator that is seeded with it"
            )
        self._check_store(first)
        self.drift, self.split = self._drift()
        for number, seed in enumerate(seeds[1:], start=2):
            if seed not in self.truth:
                kept = self.store.truth(seed)
                self.truth[seed] = self._finite(seed, self.sampled.run(seed) if kept is None else kept)
                if kept is None:
                    self.store.keep_truth(seed, self.truth[seed], self.sampled.uncached[-1])
            self.tick("uncached samples", 0.1 + 0.3 * number / len(seeds))
        shapes = {tuple(samples.shape) for samples in self.truth.values()}
        if len(shapes) > 1:
            raise ScheduleError(f"calibrate: samples of different seeds have different shapes: {sorted(shapes)}")
        if len(seeds) > 1 and all(torch.equal(again, self.truth[seed]) for seed in seeds[1:]):
            raise ScheduleError("calibrate: the samples of all seeds are alike; sample(model, seed) must use its seed")
        self.seconds["truth"] = self.uncached * (len(seeds) + 1)

    def borrow(self, other: Study) -> None:
        """Take the uncached samples of the same model and sampler under another granularity; no drift is measured."""
        self.truth, self.tape = other.truth, other.tape
        self.sampled.run(self.request.seeds[0])
        self.sampled.steps = other.sampled.steps
        self.store.seconds = other.store.seconds
        self.seconds["truth"] = self.uncached

    def count(self, name: str, other: Study) -> None:
        """Take what another study of the same request cost so far into what this one did."""
        self.seconds |= {f"{name} {part}": seconds for part, seconds in other.seconds.items()}

    def by_branches(self) -> Study:
        """The same with branches cached one by one, where rows that don't compute the experts compute some of them.

        The drift of whole regions stands in for theirs: it says where full steps are wanted, rollouts decide.

        Raises:
            ScheduleError: no experts that can be taken apart; says why.
        """
        regions = self.sampled.program.regions
        parts = Partial(0, self.request.branches)
        apart = [one.kind == "experts" and one.tokens is not None for one in regions]
        if not any(apart):
            reasons = "; ".join(f"{one.key}: {one.whole}" for one in regions if one.kind == "experts")
            raise ScheduleError(
                f"calibrate: branches={parts.tau:g}, but no experts can be taken apart by themselves at granularity "
                f"{self.granularity!r}: {reasons or 'it has no columns of experts'}. Leave branches out"
            )
        full = tuple(Action.COMPUTE for _ in regions)
        cheap = tuple(parts if found else Action.FORECAST for found in apart)
        caching = Schedule((full, cheap), regions.keys, order=1, granularity=self.granularity)
        request = replace(self.request, predictors=predictors_of(1))
        study = Study(self.model, self.sample, self.granularity, self.inner, request, self.tick, caching)
        study.borrow(self)
        study.drift, study.split = self.drift, self.split
        return study

    def _record(self, call: Call) -> None:
        if call.program is self.sampled.program:
            self.tape.record(call)

    def _finite(self, seed: int, samples: torch.Tensor) -> torch.Tensor:
        if not bool(samples.isfinite().all()):
            raise ScheduleError(
                f"calibrate: the uncached samples of seed {seed} aren't all finite; mend the model or the sampler first"
            )
        return samples

    def _check_store(self, first: int) -> None:
        self.store.check(
            {
                "graph": self.sampled.program.regions.fingerprint,
                "granularity": self.granularity,
                "steps": self.sampled.steps,
                "timesteps": list(self.tape.timesteps.values()),
            }
        )
        if self.request.folder is not None:
            for seed in (*self.request.seeds, *self.request.holdout):
                self._check_origin(seed)
        kept = self.store.truth(first)
        if kept is None:
            self.store.keep_truth(first, self.truth[first], self.sampled.uncached[-1])
        elif kept.shape != self.truth[first].shape or not torch.allclose(
            kept, self.truth[first], rtol=1e-3, atol=1e-3 * float(kept.abs().max())
        ):
            raise ScheduleError(
                f"resume={str(self.request.folder)!r} holds other samples for seed {first}: it was made with other "
                "weights or another sampler. Name another folder"
            )

    def _check_origin(self, seed: int) -> None:
        """Whether what is kept of a seed was sampled from what its sampler starts from now; noted for a new one."""
        now, kept = self.sampled.origin(seed), self.store.origins.get(seed)
        if kept is None and self.store.truth(seed) is None:
            self.store.keep_origin(seed, now)
        elif kept is None or not alike(kept, now):
            folder = f"resume={str(self.request.folder)!r}"
            known = (
                f"{folder} doesn't say which inputs seed {seed} was sampled from"
                if kept is None
                else f"{folder} holds a sample of seed {seed} from other inputs: another prompt, label, latent "
                "or first timestep"
            )
            raise ScheduleError(f"{known}. Name another folder, or delete this one")

    @property
    def uncached(self) -> float:
        """Seconds of one uncached trajectory, without compiling."""
        return max(statistics.median(self.store.seconds or self.sampled.uncached), 1e-6)

    @cached_property
    def data_range(self) -> float:
        """Of the samples."""
        if self.request.data_range is not None:
            return self.request.data_range
        spread = max(float(t.max()) for t in self.truth.values()) - min(float(t.min()) for t in self.truth.values())
        return spread or 1.0

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of each step, where they go one way: only then can a row be found by its timestep."""
        found = [self.tape.timesteps[step] for step in sorted(self.tape.timesteps)]
        one_way = found in (sorted(set(found)), sorted(set(found), reverse=True))
        return tuple(found) if one_way and len(found) == self.sampled.steps else ()

    # -- measurements -----------------------------------------------------------------------------------------------

    @property
    def letters(self) -> str:
        """The row kinds that plans may use: with a variant to spare, the partial ones too."""
        partial = [letter for letter in PARTIAL if letter in self.sampled.kinds]
        return FULL + NONE + "".join(partial if self.request.max_variants > 2 else ())

    def _drift(self) -> tuple[Drift, Drift | None]:
        """How far forecasts are off, from one in `MEASURED` seeds; and by groups of regions, from one seed.

        The uncached samples of these seeds come with it.
        """
        given = self.request.seeds
        count = max(2, len(given) // MEASURED)
        seeds = given[1 : 1 + count] if len(given) > count else given  # the first one has been sampled
        budget = self.request.budget
        share = min(budget.macs or 1.0, budget.latency or 1.0)
        lookback = min(max(LOOKBACK, math.ceil(GAPS / share)), self.sampled.steps - 1)
        whole = self._measured("drift", FULL + NONE, seeds, lookback)
        if self.letters == FULL + NONE:
            return whole, None
        split = self._measured("split", self.letters, seeds[:1], min(SPLIT, self.sampled.steps - 1))
        return whole, extended(split, whole)

    def _measured(self, name: str, letters: str, seeds: Sequence[int], lookback: int) -> Drift:
        wanted = {"letters": letters, "lookback": lookback, "seeds": list(seeds)}
        kept = self.store.drift(wanted, name)
        if kept is not None:
            self.seconds["measure"] += float(kept[1]["seconds"])
            return kept[0]
        self.tick(name, 0.05)
        self.sampled.warm(seeds[0], letters)
        before = self.sampled.seconds
        experts = ExpertWatch(self.sampled.program)
        drift, samples = measure(
            self.sampled, seeds, self._mixing,
            letters=letters, lookback=lookback, memory=self.request.memory, watch=experts.see,
        )  # fmt: skip
        new = [seed for seed in seeds if seed not in self.truth]  # counted among the uncached samples
        for seed in new:
            self.truth[seed] = self._finite(seed, samples[seed])
            self.store.keep_truth(seed, samples[seed], self.sampled.uncached[-1])
        seconds = self.sampled.seconds - before - len(new) * self.sampled.uncached[-1]
        self.seconds["measure"] += seconds
        extra = {"seconds": seconds, "linear": self._mixing.found, "experts": experts.as_json()}
        self.store.keep_drift(drift, wanted, extra, name)
        return drift

    @cached_property
    def _mixing(self) -> Mixing:
        return find_mixing(self.sampled, self.request.seeds[0], self.tape)

    @cached_property
    def costs(self) -> Costs:
        timed = self.request.budget.latency is not None
        return costs(self.sampled, self.letters, self.request.predictors, self.request.seeds[0], timed)

    # -- search -----------------------------------------------------------------------------------------------------

    def rollout(self, plan: Plan, seed: int) -> tuple[float, ...]:
        """Of each sample of `seed`, the mean squared error of the plan against the uncached one."""
        if not plan.caches:
            return (0.0,) * len(_rows(self.truth[seed]))
        if (plan, seed) not in self.store.rollouts:
            before = self.sampled.seconds
            found = self.errors(seed, self.sampled.run(seed, plan))
            self.store.keep_rollout(plan, seed, found, self.sampled.seconds - before)
        errors, seconds = self.store.rollouts[plan, seed]
        self.seconds["search"] += seconds
        return errors

    def errors(self, seed: int, samples: torch.Tensor) -> list[float]:
        """Of each of `seed`'s samples its mean squared error; one that isn't finite is as wrong as can be."""
        error = _rows(samples - self.truth[seed]).square().mean(dim=1)
        return [value if math.isfinite(value) else WORST for value in error.tolist()]

    def make_stale(self) -> None:
        """Perturb so many experts as were asked for, those that drift most first; kept in the store."""
        kept = self.store.drift()
        noted = [] if kept is None else kept[1]["experts"]
        drifts = {(one["region"], one["expert"]): one["forecast"] for one in noted}
        every = [
            (region, info, expert)
            for region in self.sampled.program.regions
            for info in region.experts
            for expert in range(info.router.num_experts if info.router is not None else 0)
            if (region.key, expert) in drifts
        ]
        every.sort(key=lambda one: -drifts[one[0].key, one[2]])
        asked, seed = every[: self.request.perturb], self.request.seeds[0]
        done = {(one.region, one.expert, one.seed) for one in self.store.harms()}
        left = [one for one in asked if (one[0].key, one[2], seed) not in done]
        cost = f"{len(left)} experts stale, one by one: about {PRICE * len(left)} uncached trajectories"
        begin = self.sampled.seconds
        for number, (region, info, expert) in enumerate(left):
            self.tick(f"{cost} of {self.uncached:.2g} s", 0.4 + 0.1 * number / len(left))
            made = stale_samples(self.sampled, seed, region, info, expert)
            self.sampled.uncached.pop()  # this one isn't typical
            errors = _rows(made - self.truth[seed]).square().mean(dim=1).tolist()
            self.store.keep_harm(
                PerturbationResult(region.key, region.layer, expert, seed, mean_psnr([errors], self.data_range))
            )
        self.seconds["perturb"] = self.sampled.seconds - begin

    def race(self) -> Race:
        effort = max(self.request.effort, 1e-9)

        def told(plan: Plan, quality: float, seeds: int) -> None:
            text = f"{self.costs.fraction(plan):.1%} of the MACs: {quality:.1f} dB on {seeds} seeds"
            self.tick(text, 0.4 + 0.55 * race.spent / effort)

        race = Race(
            self.request.seeds, self.rollout, lambda plan: self.costs.fraction(plan) + OVERHEAD, self.data_range, told
        )
        return race

    def search(self) -> tuple[Plan, Search]:
        """The best plan for the request, and the search that found it."""
        search = Search(
            self.sampled.steps, kinds_of(self.sampled.program), self.costs, self.drift, self.race(),
            self.request.predictors, letters=self.letters, split=self.split, variants=self.request.max_variants,
            effort=self.request.effort,
        )  # fmt: skip
        begin, sampled = self.sampled.clock(), self.sampled.seconds
        budget = self.request.budget
        plan = cheapest(search, budget) if budget.psnr_db is not None else search.best(budget)
        self.seconds["plan"] = self.sampled.clock() - begin - (self.sampled.seconds - sampled)
        return plan, search

    def held_out(self, plan: Plan | Schedule) -> float | None:
        """Quality on the seeds that the search didn't see."""
        if not self.request.holdout:
            return None
        if isinstance(plan, Plan):
            errors = [self.rollout(plan, seed) for seed in self.request.holdout]
        else:
            errors = [tuple(self.errors(seed, self.sampled.run(seed, plan))) for seed in self.request.holdout]
        return mean_psnr(errors, self.data_range)


def _rows(samples: torch.Tensor) -> torch.Tensor:
    """[samples, numbers]"""
    return samples.reshape(len(samples), -1) if samples.ndim > 1 else samples.reshape(1, -1)
