"""A study of one model under one granularity: its uncached samples, its drift, its costs, and searches over them."""

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
from moeca_compile.planner.latency import costs
from moeca_compile.planner.quality import errors_of, name_of, rows_of
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Call, SampledModel, Sampler, kinds_of
from moeca_compile.planner.search.cheapest import cheapest
from moeca_compile.planner.search.cost import Costs
from moeca_compile.planner.search.drift import Drift, extended
from moeca_compile.planner.search.floor import Floor
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.race import Race
from moeca_compile.planner.search.rows import FULL, NONE, PARTIAL, Plan
from moeca_compile.planner.search.search import Search
from moeca_compile.planner.store import Store, is_close
from moeca_compile.planner.truth import Goal, Target
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.granularity import OUTPUT
from moeca_compile.schedule.output import GIVEN, UNCACHED
from moeca_compile.schedule.timeline import is_monotonic

LOOKBACK = 20  # least age, in steps, of the outputs that are measured
GAPS = 4  # also measure ages up to so many mean gaps between computed steps: an order-2 forecast spans three of them
SEEDS_PER_MEASURED = 4  # the drift is measured on one in so many seeds, at least on two
SPLIT_LOOKBACK = 8  # steps, for partial rows, on one seed: each kind of row makes the measurement more expensive
OVERHEAD = 0.06  # cost of a run beside its computed regions, in uncached trajectories


@dataclass
class Study:
    """One model under one granularity.

    Attributes:
        model, sample, granularity, inner: as for `calibrate`.
        request: the other arguments of `calibrate`.
        report_progress: called with what is being done and the fraction done.
        caching: as in `SampledModel`.
        goal: `truth` of `calibrate`, as `read_truth` gives it.
        target: what rollouts are compared with. Of granularity `output` the uncached samples.
        sampled: the compiled model.
        store: keeps the results in the `resume` folder.
        truth: the uncached samples of each seed.
        shared: those that other processes drew, with their seconds; the store lacks them.
        seconds: what each part of the calibration took.
        recording: of an uncached run.
        drift: estimates plans without partial rows.
        split: estimates plans with partial rows; None: there are no partial rows.
    """

    model: Any
    sample: Sampler
    granularity: str
    inner: str
    request: Request
    report_progress: ProgressCallback
    caching: Schedule | None = None
    goal: Goal = UNCACHED

    def __post_init__(self) -> None:
        self.sampled = SampledModel(self.model, self.sample, self.granularity, self.inner, self.caching)
        folder = self.request.folder
        name = self.granularity.replace(":", "_")
        if self.caching is not None:
            name += f"_branches_{self.request.branches:g}"
        self.store = Store(None if folder is None else folder / name)
        self.target = Target(UNCACHED if self.granularity == OUTPUT else self.goal, self.store)
        self.truth: dict[int, torch.Tensor] = {}
        self.shared: dict[int, tuple[torch.Tensor, float]] = {}
        self.seconds: dict[str, float] = {"truth": 0.0, "measure": 0.0, "search": 0.0}
        self.recording = CallRecording()
        self.drift: Drift
        self.split: Drift | None
        self.is_sampled = False
        self._costs: Costs | None = None

    # -- the truth --------------------------------------------------------------------------------------------------

    def sample_uncached(self) -> None:
        """Sample all seeds uncached and measure the drift, unless that is done.

        Raises:
            ScheduleError: the sampler is not deterministic, ignores its seed, returns NaN or samples of different
                shapes; or the `resume` folder belongs to another calibration.
        """
        if self.is_sampled:
            if not self.has_drift:  # it borrowed samples, and measured nothing
                self.drift, self.split = self._drift()
            return
        seeds = (*self.request.seeds, *self.request.holdout)
        again = self._sample_first()
        self._aim(seeds[:1])
        for seed, (samples, seconds) in self.shared.items():
            self.truth[seed] = self._finite(seed, samples)
            self.store.add_truth(seed, samples, seconds)
        self.drift, self.split = self._drift()
        for number, seed in enumerate(seeds[1:], start=2):
            self.draw(seed)
            self.report_progress("uncached samples", 0.1 + 0.3 * number / len(seeds))
        shapes = {tuple(samples.shape) for samples in self.truth.values()}
        if len(shapes) > 1:
            raise ScheduleError(f"calibrate: samples of different seeds have different shapes: {sorted(shapes)}")
        if len(seeds) > 1 and all(torch.equal(again, self.truth[seed]) for seed in seeds[1:]):
            raise ScheduleError("calibrate: the samples of all seeds are alike; sample(model, seed) must use its seed")
        self._aim(seeds)
        self.seconds["truth"] = self.uncached * (len(seeds) + 1)
        self.is_sampled = True

    def _sample_first(self) -> torch.Tensor:
        """Sample the first seed twice, and compare the folder with it; its samples."""
        first = self.request.seeds[0]
        self.report_progress("uncached samples", 0.0)
        self.truth[first] = self._finite(first, self.sampled.run(first))
        self.sampled.uncached.clear()  # the first run compiled the model
        again = self.sampled.run(first, watch=self._record)
        if not self.sampled.uncached:  # it compiled something too
            self.sampled.run(first)
        if not torch.equal(again, self.truth[first]):
            raise ScheduleError(
                "calibrate: sample(model, seed) gave two results for one seed; it must depend on its seed alone: "
                "draw all noise from a generator that is seeded with it"
            )
        self._check_store(first)
        return again

    def draw(self, seed: int) -> None:
        """The uncached samples of a seed, unless they are known."""
        if seed in self.truth:
            return
        stored = self.store.truth(seed)
        self.truth[seed] = self._finite(seed, self._sample(seed) if stored is None else stored)
        if stored is None:
            self.store.add_truth(seed, self.truth[seed], self.sampled.uncached[-1])

    def draw_shard(self, seeds: Sequence[int]) -> None:
        """Sample the first seed of all, by which shards are compared, and these seeds; measure nothing.

        Raises:
            ScheduleError: as `sample_uncached`.
        """
        self._sample_first()
        self._aim(self.request.seeds[:1])
        for number, seed in enumerate(seeds, start=1):
            self.draw(seed)
            self._aim([seed])
            self.report_progress("uncached samples", number / len(seeds))

    def _aim(self, seeds: Sequence[int]) -> None:
        """Have what the rollouts of seeds are compared with, and count its time if the caller gives it."""
        begin = self.sampled.clock()
        for seed in seeds:
            self.target.of(seed, self.truth[seed])
        if self.target.is_given:
            self.spend("given", self.sampled.clock() - begin)

    def borrow(self, other: Study) -> None:
        """Use the uncached samples of a study of the same model and sampler; no drift is measured."""
        if self.is_sampled:
            return
        self.truth, self.recording, self.target = other.truth, other.recording, other.target
        self.sampled.run(self.request.seeds[0])
        self.sampled.steps = other.sampled.steps
        self.store.seconds = other.store.seconds
        self.seconds["truth"] = self.uncached
        self.is_sampled = True

    @property
    def has_drift(self) -> bool:
        """Whether its own columns were measured: not, if it borrowed the samples of a study with other columns."""
        return "drift" in vars(self)

    def count(self, name: str, other: Study) -> None:
        """Add the cost of another study of the same request to the cost of this one."""
        self.seconds |= {f"{name} {part}": seconds for part, seconds in other.seconds.items()}

    def spend(self, part: str, seconds: float) -> None:
        """Add seconds to the cost of a part of the calibration."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def _sample(self, seed: int) -> torch.Tensor:
        """The uncached samples of a seed."""
        return self.sampled.run(seed)

    def _record(self, call: Call) -> None:
        if self.sampled.is_main(call.program):
            self.recording.record(call)

    def _finite(self, seed: int, samples: torch.Tensor) -> torch.Tensor:
        if not bool(samples.isfinite().all()):
            raise ScheduleError(
                f"calibrate: the uncached samples of seed {seed} aren't all finite; fix the model or the sampler first"
            )
        return samples

    def _check_store(self, first: int) -> None:
        self.store.check(
            {
                "graph": self.sampled.program.regions.fingerprint,
                "granularity": self.granularity,
                "steps": self.sampled.steps,
                "timesteps": list(self.recording.timesteps.values()),
                "quality": name_of(self.request.quality),
                "truth": GIVEN if self.target.is_given else None,
            }
        )
        if self.request.folder is not None:
            for seed in (*self.request.seeds, *self.request.holdout):
                self.store.check_origin(seed, self.sampled.origin(seed))
        stored = self.store.truth(first)
        if stored is None:
            self.store.add_truth(first, self.truth[first], self.sampled.uncached[-1])
        elif not is_close(stored, self.truth[first]):
            raise ScheduleError(
                f"resume={str(self.request.folder)!r} holds other samples for seed {first}: it was made with other "
                "weights or another sampler. Name another folder"
            )

    @property
    def uncached(self) -> float:
        """Seconds of one uncached trajectory, without compiling."""
        return max(statistics.median(self.store.seconds or self.sampled.uncached), 1e-6)

    @property
    def trajectories(self) -> float:
        """What the calibration cost so far, in uncached trajectories."""
        return sum(self.seconds.values()) / self.uncached

    @cached_property
    def data_range(self) -> float:
        """Of the samples, for the PSNR."""
        if self.request.data_range is not None:
            return self.request.data_range
        highest = max(float(samples.max()) for samples in self.truth.values())
        lowest = min(float(samples.min()) for samples in self.truth.values())
        return highest - lowest or 1.0

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of each step; empty if they do not strictly rise or fall, because rows can't be found by them then."""
        timesteps = [timestep for _, timestep in sorted(self.recording.timesteps.items())]
        return tuple(timesteps) if is_monotonic(timesteps) and len(timesteps) == self.sampled.steps else ()

    # -- measurements -----------------------------------------------------------------------------------------------

    @property
    def letters(self) -> str:
        """The row kinds that plans may use: partial rows only if a third variant is allowed."""
        partial = [letter for letter in PARTIAL if letter in self.sampled.kinds]
        return FULL + NONE + "".join(partial if self.request.max_variants > 2 else ())

    def _drift(self) -> tuple[Drift, Drift | None]:
        """The drift of all regions together, and that of groups of regions from one seed.

        The measurement also gives the uncached samples of its seeds.
        """
        seeds = self.measured_seeds()
        budget = self.request.budget
        share = min(budget.macs or 1.0, budget.latency or 1.0)
        lookback = min(max(LOOKBACK, math.ceil(GAPS / share)), self.sampled.steps - 1)
        total = self._measured("drift", FULL + NONE, seeds, lookback)
        if self.letters == FULL + NONE:
            return total, None
        split = self._measured("split", self.letters, seeds[:1], min(SPLIT_LOOKBACK, self.sampled.steps - 1))
        return total, extended(split, total)

    def measured_seeds(self) -> Sequence[int]:
        """The seeds that the drift is measured on."""
        all_seeds = self.request.seeds
        count = max(2, len(all_seeds) // SEEDS_PER_MEASURED)
        return all_seeds[1 : 1 + count] if len(all_seeds) > count else all_seeds  # the first is sampled already

    def _measured(self, name: str, letters: str, seeds: Sequence[int], lookback: int) -> Drift:
        """The drift from the store, or a new measurement."""
        settings = {"letters": letters, "lookback": lookback, "seeds": list(seeds)}
        stored = self.store.drift(settings, name)
        if stored is not None:
            drift, extra = stored
            self.seconds["measure"] += float(extra["seconds"])
            return drift
        self.report_progress(name, 0.05)
        self.sampled.warm(seeds[0], letters)
        begin = self.sampled.seconds
        experts = ExpertWatch(self.sampled.program)
        drift, samples = measure(
            self.sampled, seeds, self._mixing,
            letters=letters, lookback=lookback, memory=self.request.memory, watch=experts.observe,
        )  # fmt: skip
        new_seeds = [seed for seed in seeds if seed not in self.truth]  # their cost counts as uncached samples
        for seed in new_seeds:
            self.truth[seed] = self._finite(seed, samples[seed])
            self.store.add_truth(seed, samples[seed], self.sampled.uncached[-1])
        seconds = self.sampled.seconds - begin - (len(new_seeds) * self.sampled.uncached[-1] if new_seeds else 0.0)
        self.seconds["measure"] += seconds
        extra = {"seconds": seconds, "linear": self._mixing.is_linear, "experts": experts.as_json()}
        self.store.add_drift(drift, settings, extra, name)
        return drift

    @cached_property
    def _mixing(self) -> Mixing:
        return find_mixing(self.sampled, self.request.seeds[0], self.recording)

    @property
    def costs(self) -> Costs:
        """The costs of each row kind; milliseconds only with a latency budget."""
        timed = self.request.budget.latency is not None
        if self._costs is None or (timed and not self._costs.ms):
            found = costs(self.sampled, self.letters, self.request.predictors, self.request.seeds[0], timed)
            self._costs = replace(found, full_steps=frozenset(self.recording.changes))
        return self._costs

    # -- search -----------------------------------------------------------------------------------------------------

    def rollout(self, plan: Plan, seed: int, schedule: Schedule | None = None) -> tuple[float, ...]:
        """For each sample of `seed` the mean squared error of the plan against the target. `schedule`: is run in place
        of the plan's own, by which the result is kept."""
        if not plan.caches:
            return tuple(self.errors(seed, self.truth[seed]))
        if (plan, seed) not in self.store.rollouts:
            begin = self.sampled.seconds
            samples = self.sampled.run(seed, schedule or plan)
            new_errors, seconds = self.errors(seed, samples), self.sampled.seconds - begin
            to_uncached = self.errors_to(self.truth[seed], samples) if self.target.is_given else new_errors
            self.store.add_rollout(plan, seed, new_errors, seconds, to_uncached)
        errors, seconds = self.store.rollouts[plan, seed]
        self.seconds["search"] += seconds
        return errors

    def errors(self, seed: int, samples: torch.Tensor) -> list[float]:
        """The error of each sample of `seed` to the target; none for the uncached samples themselves."""
        target = self.target.of(seed, self.truth[seed])
        return [0.0] * len(rows_of(samples)) if samples is target else self.errors_to(target, samples)

    def errors_to(self, wanted: torch.Tensor, samples: torch.Tensor) -> list[float]:
        """The error of each sample, as `errors_of` gives it."""
        return errors_of(samples, wanted, self.request.quality, self.data_range)

    def race(self) -> Race:
        """A race on the seeds of the request."""
        effort = max(self.request.effort, 1e-9)

        def price(plan: Plan) -> float:
            return self.costs.fraction(plan) + OVERHEAD

        def progress(plan: Plan, quality: float, seeds: int) -> None:
            text = f"{self.costs.fraction(plan):.1%} of the MACs: {quality:.1f} dB on {seeds} seeds"
            self.report_progress(text, 0.4 + 0.55 * race.spent / effort)

        race = Race(self.request.seeds, self.rollout, price, self.data_range, progress)
        return race

    def search(self) -> tuple[Plan, Search]:
        """The best plan for the request, and the search that found it."""
        search = Search(
            self.sampled.steps, kinds_of(self.sampled.program), self.costs, self.drift, self.race(),
            self.request.predictors, letters=self.letters, split=self.split, variants=self.request.max_variants,
            effort=self.request.effort, floor=self._floor(),
        )  # fmt: skip
        begin, sampling_begin = self.sampled.clock(), self.sampled.seconds
        budget = self.request.budget
        plan = cheapest(search, budget) if budget.psnr_db is not None else search.best(budget)
        self.spend("plan", self.sampled.clock() - begin - (self.sampled.seconds - sampling_begin))
        return plan, search

    def _floor(self) -> Floor | None:
        """The distance of the uncached samples from given ones; None: rollouts are compared with the uncached ones."""
        if not self.target.is_given:
            return None
        uncached = mean_psnr((self.errors(seed, self.truth[seed]) for seed in self.request.seeds), self.data_range)
        return Floor(uncached, self._quality_to_uncached)

    def _quality_to_uncached(self, plan: Plan) -> float:
        """Mean PSNR in dB of a plan to the uncached samples, on the seeds that it has run on."""
        errors = [self.store.to_uncached.get((plan, seed)) for seed in self.request.seeds]
        return mean_psnr([each for each in errors if each is not None], self.data_range)

    def held_out(self, plan: Plan | None, schedule: Schedule | None = None) -> float | None:
        """Mean PSNR in dB on the held-out seeds, as `rollout` runs them; None: there are none. Without a plan no result
        is kept."""
        if not self.request.holdout:
            return None
        if plan is not None:
            errors = [self.rollout(plan, seed, schedule) for seed in self.request.holdout]
        else:
            errors = [tuple(self.errors(seed, self.sampled.run(seed, schedule))) for seed in self.request.holdout]
        return mean_psnr(errors, self.data_range)
