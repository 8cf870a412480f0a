"""The arguments of a calibration, checked before anything runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.search.predict import Predictor, predictors_of
from moeca_compile.schedule.budget import Budget
from moeca_compile.schedule.decode import short

if TYPE_CHECKING:  # it imports torch, and commands check their arguments before that
    from moeca_compile.planner.quality import QualityFunction

HOLDOUT = 1000  # the first held-out seed, where `holdout` is a number of seeds
MOST_SEEDS = 1000
EFFORT = 1.25  # of the rollouts, in uncached trajectories per seed


@dataclass(frozen=True)
class Request:
    """The arguments of `calibrate` that do not concern the model; `calibrate` describes them.

    Attributes:
        text: the budget as the caller wrote it.
        folder: `resume`.
    """

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
    quality: QualityFunction | None = None

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
        quality: QualityFunction | None = None,
    ) -> Request:
        """Check the arguments of `calibrate`.

        Raises:
            ScheduleError: an argument is out of range. The message names it.
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
        for name, numbers in (("seeds", seeds), ("holdout", holdout)):
            if len(set(numbers)) < len(numbers):
                raise ScheduleError(f"calibrate: {name}={numbers} has a seed twice")
        if max_variants < 2:
            raise ScheduleError(f"calibrate: max_variants={max_variants}, but a schedule that saves work has two rows")
        if effort is not None and not 0 <= effort < math.inf:
            raise ScheduleError(f"calibrate: effort={effort}, expected a finite number of uncached trajectories >= 0")
        if data_range is not None and not data_range > 0:
            raise ScheduleError(f"calibrate: data_range={data_range}, expected a number > 0")
        if type(memory) is not int or memory < 0:
            raise ScheduleError(f"calibrate: memory={memory!r}, expected a whole number of bytes >= 0")
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
        if quality is not None and not callable(quality):
            raise ScheduleError(
                f"calibrate: quality={short(quality)}, expected a function (samples, wanted) -> one number a sample"
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
            quality=quality,
        )


def _seeds(name: str, argument: Sequence[int] | int, first: int) -> tuple[int, ...]:
    """The seeds of an argument: a sequence of seeds, or their number, counted from `first`."""
    if isinstance(argument, int) and not isinstance(argument, bool) and 0 <= argument <= MOST_SEEDS:
        return tuple(range(first, first + argument))
    try:
        is_text = isinstance(argument, (str, bytes))
        seeds = () if is_text else tuple(operator.index(seed) for seed in argument)  # type: ignore[union-attr]
    except TypeError:
        seeds = ()
    if not seeds and argument != ():
        raise ScheduleError(f"calibrate: {name}={short(argument)}, expected whole numbers, or how many there are to be")
    return seeds


def _folder(resume: str | Path) -> Path:
    try:
        Path(resume).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = "it is no folder" if isinstance(error, (FileExistsError, NotADirectoryError)) else error
        raise ScheduleError(
            f"calibrate: resume={str(resume)!r} can't keep a calibration: {reason}. Name a folder, or one to be made"
        ) from error
    return Path(resume)
