"""What samples should be near, where that isn't the uncached run of the same model: given samples, or another model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeca_compile.errors import ScheduleError, UserError
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.model_arguments import models_of, swapped_in
from moeca_compile.frontend.prompts import takes
from moeca_compile.planner.search.quality import mean_psnr
from moeca_compile.planner.search.rows import Plan
from moeca_compile.planner.store import Store, is_close
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.decode import short
from moeca_compile.schedule.granularity import OUTPUT
from moeca_compile.schedule.output import CONVERGED, GIVEN, UNCACHED

if TYPE_CHECKING:
    from moeca_compile.planner.request import Request
    from moeca_compile.planner.study import Study

Goal = str | Mapping[int, Tensor] | Callable[[int], Tensor]
Truth = Goal | nn.Module | Sequence[nn.Module]


def read_truth(
    truth: Any, sample: Callable[..., Any], seeds: Collection[int], what: str, error: type[UserError],
    run: Callable[[Any, int], Any],
) -> Goal:  # fmt: skip
    """The samples that a truth means, checked before anything is sampled.

    Args:
        truth: `uncached`, `converged`, samples by seed, a function of the seed, or the model (a module, a pipeline, or
            modules of one loop) whose samples they are.
        sample: the caller's loop.
        seeds: that will be sampled.
        what: name of the public function, for the message.
        error: that is raised.
        run: samples a seed with that model.

    Raises:
        UserError: an unknown truth, a loop that doesn't take `steps` for `converged`, or no samples for a seed.
    """
    if isinstance(truth, Mapping):
        if missing := [seed for seed in seeds if seed not in truth]:
            raise error(f"{what}: truth has no samples for seed {missing[0]}; give them for every seed")
        for seed in seeds:
            _as_samples(truth[seed], seed, what, error)  # before hours are spent
        return truth
    if isinstance(truth, str) and truth in (UNCACHED, CONVERGED):
        if truth == CONVERGED and not takes(sample, "steps"):
            raise error(
                f"{what}: truth='converged' samples with more steps, but sample(model, seed) takes none: give it a "
                "keyword steps, sample(model, seed, steps=50)"
            )
        return truth
    of_one_loop = isinstance(truth, (list, tuple)) and truth and all(isinstance(part, nn.Module) for part in truth)
    if isinstance(truth, nn.Module) or of_one_loop or parts_of(truth):
        return lambda seed: run(truth, seed)
    if callable(truth):
        return truth  # type: ignore[no-any-return]
    raise error(
        f"{what}: truth={short(truth)}, expected one of {UNCACHED}, {CONVERGED}, the samples of each seed (a mapping "
        "from seeds to tensors, or a function of the seed), or a model"
    )


def sample_other(truth: Any, model: Any, sample: Callable[..., Any], seed: int, what: str) -> Any:
    """The samples of another model in the caller's loop, as its own code gives them.

    Args:
        truth: the other model, or the models of one loop, or a pipeline of them.
        model: what the caller passed in its place. The other one is set on it while it samples if it is a pipeline.
        sample: the caller's loop.
        seed: passed to the loop.
        what: name of the public function, for the message.
    """
    others = models_of(truth, what)
    with swapped_in(others, model), torch.no_grad():
        return sample(others[0] if len(others) == 1 else others, seed)


def given_samples(goal: Goal, seed: int, uncached: Tensor, what: str, error: type[UserError]) -> Tensor:
    """The given samples of a seed, float32, on the CPU.

    Args:
        goal: samples by seed, or a function of the seed.
        seed: that they are for.
        uncached: the uncached samples of the seed.
        what: name of the public function, for the message.
        error: that is raised.

    Raises:
        UserError: no tensor, or another shape than the uncached ones (another number of samples, too), or not finite.
    """
    assert not isinstance(goal, str)
    wanted = _as_samples(goal[seed] if isinstance(goal, Mapping) else goal(seed), seed, what, error)
    if wanted.shape != uncached.shape:
        shapes = f"have shape {list(wanted.shape)}, the sampler's {list(uncached.shape)}"
        raise error(f"{what}: the samples that truth gives for seed {seed} {shapes}")
    return wanted


def _as_samples(samples: Any, seed: int, what: str, error: type[UserError]) -> Tensor:
    """Float32, on the CPU. Raises: as `given_samples`, but for the shape."""
    try:
        wanted = torch.as_tensor(samples).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise error(
            f"{what}: truth gives a {type(samples).__name__} for seed {seed}, expected a tensor of samples"
        ) from None
    if not bool(wanted.isfinite().all()):
        raise error(f"{what}: the samples that truth gives for seed {seed} aren't all finite")
    return wanted


class Target:
    """What rollouts are compared with: the uncached samples, or samples that the caller gives.

    Args:
        goal: as `read_truth` gives it.
        store: keeps given samples beside the rollouts that were compared with them.

    Attributes:
        is_given: whether the caller gives them.
    """

    def __init__(self, goal: Goal, store: Store) -> None:
        self._goal, self._store = goal, store
        self._given: dict[int, Tensor] = {}
        self.is_given = not isinstance(goal, str)

    def of(self, seed: int, uncached: Tensor) -> Tensor:
        """The samples of a seed.

        Args:
            seed: that they are for.
            uncached: its uncached samples.

        Raises:
            ScheduleError: as `given_samples`; or the folder holds others.
        """
        if not self.is_given:
            return uncached
        if seed not in self._given:
            self._given[seed] = self._read(seed, uncached)
        return self._given[seed]

    def _read(self, seed: int, uncached: Tensor) -> Tensor:
        """Given samples, which are compared with those of the folder; from a function, those of the first seed are."""
        stored = self._store.arrays(GIVEN, seed, lambda arrays: torch.from_numpy(arrays["samples"]))
        if stored is not None and self._given and not isinstance(self._goal, Mapping):
            return stored
        samples = given_samples(self._goal, seed, uncached, "calibrate", ScheduleError)
        if stored is None:
            self._store.add_arrays(GIVEN, seed, {"samples": samples.numpy()})
        elif not is_close(stored, samples):
            assert self._store.path is not None
            raise ScheduleError(
                f"resume={str(self._store.path.parent)!r} was compared with other samples that truth gave for seed "
                f"{seed}. Name another folder"
            )
        return samples


def goal_of(truth: Truth, model: Any, sample: Callable[..., Any], request: Request, granularity: str) -> Goal:
    """The samples that `truth` of `calibrate` means, checked before anything is sampled.

    Raises:
        ScheduleError: as `read_truth`; or `converged` for a schedule of regions.
    """
    goal = read_truth(
        truth, sample, (*request.seeds, *request.holdout), "calibrate", ScheduleError,
        lambda other, seed: sample_other(other, model, sample, seed, "calibrate"),
    )  # fmt: skip
    if goal == CONVERGED and granularity != OUTPUT:
        raise ScheduleError(
            "calibrate: truth='converged' is reached by weights of the model's output. Give granularity='output' too"
        )
    return goal


def to_both_truths(
    study: Study, plan: Plan | None, schedule: Schedule, predicted: Mapping[str, float]
) -> dict[str, float]:  # fmt: skip
    """Figures to the given samples, renamed, and beside them those of the uncached run, and those to its samples.

    Args:
        study: that found the schedule.
        plan: that it is, and whose rollouts are known; None: it is more than a plan, so it is rolled out.
        schedule: for which the figures are.
        predicted: figures to the given samples.
    """
    begin, request = study.sampled.seconds, study.request

    def to_uncached(seed: int) -> Sequence[float]:
        if plan is not None:
            return study.store.to_uncached[plan, seed]
        samples = study.sampled.run(seed, schedule, hands_over=schedule.hand_over)
        return study.errors_to(study.truth[seed], samples)

    both = {key.replace("psnr_db", "psnr_db_given"): figure for key, figure in predicted.items()}
    for where, seeds in (("", request.seeds), ("_holdout", request.holdout)):
        if seeds:
            uncached = [study.errors(seed, study.truth[seed]) for seed in seeds]
            both[f"uncached_psnr_db_given{where}"] = mean_psnr(uncached, study.data_range)
            both[f"psnr_db{where}"] = mean_psnr(map(to_uncached, seeds), study.data_range)
    study.spend("both truths", study.sampled.seconds - begin)
    return both | {"trajectories": study.trajectories}
