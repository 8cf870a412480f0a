"""A study of granularity `output`: it keeps of each uncached run what the fit of the output's weights needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from moeca_compile.errors import ScheduleError, warn
from moeca_compile.frontend.prompts import PromptSampler, takes
from moeca_compile.planner.output.fit import check_enough
from moeca_compile.planner.output.given_times import check_taken, path_at
from moeca_compile.planner.output.gram import gram_of, summed
from moeca_compile.planner.output.paths import FINER, converged_path, given_path, number, record_path
from moeca_compile.planner.output.sampler import SamplerStep, sampler_steps
from moeca_compile.planner.output.wanted import Wanted, as_arrays, from_arrays
from moeca_compile.planner.rollout import TIMESTEPS
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.study import Study
from moeca_compile.planner.truth import given_samples
from moeca_compile.schedule.output import CONVERGED, GIVEN, UNCACHED

FINE = "_fine"  # in names of folders: every step of the finest run is kept too


@dataclass
class OutputStudy(Study):
    """A study of granularity `output`.

    Attributes:
        wanted: of each seed of the search.
    """

    wanted: dict[int, Wanted] = field(default_factory=dict)

    def sample_uncached(self) -> None:
        """As `Study.sample_uncached`.

        Raises:
            ScheduleError: also if the weights of the output can't be fitted for this sampler or truth.
        """
        if self.is_sampled:
            return
        super().sample_uncached()
        seeds, recorded = self.request.seeds, len(self.wanted)
        for seed in seeds:
            self._want(seed)
        again = len(seeds) - recorded  # the measurement or a folder had sampled them
        finer = sum(FINER) * len(seeds) if self.goal == CONVERGED else 0
        self.spend("wanted", self.uncached * (again + finer))

    def draw_shard(self, seeds: Sequence[int]) -> None:
        """As `Study.draw_shard`, with what the weights are fitted to."""
        super().draw_shard(seeds)
        for seed in seeds:
            if seed in self.request.seeds:
                self._want(seed)
            elif self.goal == CONVERGED:
                self.wanted_samples(seed)

    def wanted_samples(self, seed: int) -> torch.Tensor:
        """The wanted samples of a held-out seed, where they aren't the uncached ones."""
        if self.goal == CONVERGED:
            reached = self.store.arrays(CONVERGED, seed, lambda arrays: torch.from_numpy(arrays["samples"]))
            if reached is None:
                reached = converged_path(self.sampled, seed, self.sample, record_path(self.sampled, seed)).samples
                self.store.add_arrays(CONVERGED, seed, {"samples": reached.numpy()})
            return reached
        return given_samples(self.goal, seed, self.truth[seed], "calibrate", ScheduleError)

    @property
    def goal_name(self) -> str:
        """Of the goal, for the schedule's file."""
        return self.goal if isinstance(self.goal, str) else GIVEN

    def sampler(self) -> list[SamplerStep]:
        """The sampler's update of each step."""
        first, own = next(iter(self.wanted.values())), summed([wanted.own for wanted in self.wanted.values()])
        return sampler_steps(own, self.sampled.steps, first.parts, first.rounding)

    def sampler_at(self, timesteps: Sequence[float]) -> list[SamplerStep]:
        """The same at given timesteps, by an uncached run of the first seed."""
        path = path_at(self.sampled, self.request.seeds[0], self.sample, timesteps)
        return sampler_steps(gram_of(path, path.states), len(timesteps), len(path.outputs[0]), path.rounding)

    @cached_property
    def searches_times(self) -> bool:
        """Whether the sampler's timesteps are searched too."""
        if self.goal != CONVERGED or not takes(self.sample, TIMESTEPS):
            return False
        if not self.timesteps:
            warn(
                "calibrate: sample takes timesteps, but those that the model receives aren't known, or don't only fall "
                "or only rise: where the steps lie isn't searched"
            )
        elif isinstance(self.sample, PromptSampler):  # its pipeline has the keyword, and may refuse to use it
            try:
                check_taken(self.sampled, self.request.seeds[0], self.sample, self.timesteps)
            except (ScheduleError, TypeError, ValueError) as error:
                warn(
                    "calibrate: the pipeline's call has a keyword timesteps, but doesn't take those that it is given, "
                    f"so where the steps lie isn't searched: {error}"
                )
                return False
        return bool(self.timesteps)

    def _want(self, seed: int) -> None:
        """What the fit aims at for a seed that the measurement or a folder has sampled."""
        if seed in self.wanted:
            return
        # what was kept to search the timesteps serves without that, too
        kinds = [] if self.goal_name == GIVEN else dict.fromkeys((self._kept_in, f"wanted_{self.goal_name}{FINE}"))
        kept = (self.store.arrays(kind, seed, from_arrays) for kind in kinds)
        stored = next((wanted for wanted in kept if wanted is not None), None)
        if stored is None:
            self._sample(seed)
        else:
            self.wanted[seed] = stored

    @property
    def _kept_in(self) -> str:
        return f"wanted_{self.goal_name}{FINE if self.searches_times else ''}"

    def _sample(self, seed: int) -> torch.Tensor:
        if seed not in self.request.seeds:
            return super()._sample(seed)
        uncached = record_path(self.sampled, seed)
        path = uncached
        if self.goal == CONVERGED:
            self.report_progress("samples with more steps", 0.3)
            path = converged_path(self.sampled, seed, self.sample, uncached, self.searches_times)
        elif self.goal != UNCACHED:
            path = given_path(uncached, given_samples(self.goal, seed, uncached.samples, "calibrate", ScheduleError))
        own = gram_of(uncached, uncached.states)
        gram = own if path is uncached else gram_of(path, path.states)
        first_run = not self.wanted
        parts, rounding = len(uncached.outputs[0]), uncached.rounding
        wanted = Wanted(path.states, gram, own, parts, uncached.is_batched, rounding=rounding)
        if path.finer is not None:
            wanted.fine = gram_of(path.finer, path.finer.states)
            wanted.fine_timesteps = tuple(map(number, path.finer.timesteps))
        self.wanted[seed] = wanted
        if first_run:  # refuses what can't be fitted before the others are sampled
            check_enough(len(wanted.states[0]) * len(self.request.seeds), wanted.is_batched)
            self.sampler()
            if self.searches_times and not isinstance(self.sample, PromptSampler):
                check_taken(self.sampled, seed, self.sample, self.timesteps)
        if self.goal_name != GIVEN:  # given samples may be others at the next call
            self.store.add_arrays(self._kept_in, seed, as_arrays(self.wanted[seed]))
        return uncached.samples


def psnr_to_wanted(study: OutputStudy, samples: Iterable[tuple[int, torch.Tensor]]) -> float:
    """Mean PSNR to the wanted samples, dB. `samples`: seeds of the search, each with its samples."""
    errors = (study.errors_to(study.wanted[seed].states[-1], given) for seed, given in samples)
    return mean_psnr(errors, study.data_range)
