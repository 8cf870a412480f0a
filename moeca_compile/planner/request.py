"""What a calibration is asked for, read and checked before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.budget import Budget
from moeca_compile.planner.search.predict import Predictor, predictors_of
from moeca_compile.schedule.decode import short

HOLDOUT = 1000  # where a number of held-out seeds begins
MOST_SEEDS = 1000
EFFORT = 1.25  # of the rollouts, in uncached trajectories a seed


@dataclass(frozen=True)
class Request:
    """`calibrate`'s arguments that aren't the model's."""

    text: str
    budget: Budget
    predictors: tuple[Predictor, ...]
    max_variants: int
    seeds: tuple[int, ...]
    holdout: tuple[int, ...]
    effort: float
    data_range: float | None
    memory: int
    folder: Path | None
    perturb: int
    branches: float

    @classmethod
    def read(
        cls,
        budget: str,
        order: int | str,
        max_variants: int,
        seeds: Sequence[int] | int,
        holdout: Sequence[int] | int,
        effort: float | None,
        data_range: float | None,
        memory: int,
        resume: str | Path | None,
        perturb: int,
        branches: float,
    ) -> Request:
        """Check them.

        Raises:
            ScheduleError: an argument that can't be.
        """
        limits = Budget.parse(budget)
        if not isinstance(holdout, int) and not len(holdout):
            raise ScheduleError(
                "calibrate: holdout is empty, so nothing would say how good the schedule is on seeds that the search "
                "hasn't seen. Give some seeds or their number, or holdout=0 to do without that check"
            )
        seeds, holdout = _seeds("seeds", seeds, 0), _seeds("holdout", holdout, HOLDOUT)
        if not seeds or set(seeds) & set(holdout):
            raise ScheduleError("calibrate: seeds must not be empty, and no seed may be in both seeds and holdout")
        for name, given in (("seeds", seeds), ("holdout", holdout)):
            if len(set(given)) < len(given):
                raise ScheduleError(f"calibrate: {name}={given} has a seed twice")
        if max_variants < 2:
            raise ScheduleError(f"calibrate: max_variants={max_variants}, but a schedule that saves work has two rows")
        if effort is not None and effort < 0:
            raise ScheduleError(f"calibrate: effort={effort}, expected a number of uncached trajectories >= 0")
        if data_range is not None and not data_range > 0:
            raise ScheduleError(f"calibrate: data_range={data_range}, expected a number > 0")
        if perturb < 0:
            raise ScheduleError(f"calibrate: perturb={perturb}, expected a number of experts >= 0")
        if perturb and resume is None:
            raise ScheduleError("calibrate: perturb needs resume=FOLDER: what it finds is kept there (experts.jsonl)")
        if not 0 <= branches < 1:
            raise ScheduleError(f"calibrate: branches={branches}, expected a fraction of the branches below 1, or 0")
        if branches and order not in ("auto", 1):
            raise ScheduleError(
                f"calibrate: branches are forecast with order 1, not with order={order}: leave order out"
            )
        return cls(
            text=budget,
            budget=limits,
            predictors=predictors_of(order),
            max_variants=max_variants,
            seeds=seeds,
            holdout=holdout,
            effort=EFFORT * len(seeds) if effort is None else effort,
            data_range=data_range,
            memory=memory,
            folder=None if resume is None else _folder(resume),
            perturb=perturb,
            branches=branches,
        )


def _seeds(name: str, given: Sequence[int] | int, first: int) -> tuple[int, ...]:
    """Seeds as they are given, or so many of them from `first` on."""
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= MOST_SEEDS:
        return tuple(range(first, first + given))
    try:
        found = () if isinstance(given, (str, bytes)) else tuple(operator.index(one) for one in given)  # type: ignore[union-attr]
    except TypeError:
        found = ()
    if not found and given != ():
        raise ScheduleError(f"calibrate: {name}={short(given)}, expected whole numbers, or how many there are to be")
    return found


def _folder(resume: str | Path) -> Path:
    try:
        Path(resume).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = "it is no folder" if isinstance(error, (FileExistsError, NotADirectoryError)) else error
        raise ScheduleError(
            f"calibrate: resume={str(resume)!r} can't keep a calibration: {reason}. Name a folder, or one to be made"
        ) from error
    return Path(resume)
