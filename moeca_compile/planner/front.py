"""`calibrate_front`: schedules for several budgets from one set of measurements."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeca_compile.errors import ScheduleError, warn
from moeca_compile.frontend.prompts import sampler_of
from moeca_compile.inspect.progress import tell
from moeca_compile.planner.calibration import Studies, calibrate, find_schedule, reported
from moeca_compile.planner.price import price_of
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.truth import goal_of
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.decode import short
from moeca_compile.schedule.front import Front

NOT_FOR_REQUESTS = ("model", "sample", "prompts", "call", "granularity", "inner", "truth", "progress")


def calibrate_front(model: Any, sample: Sampler | None = None, *, budgets: Sequence[str], **arguments: Any) -> Front:
    """Find the best schedule within each of several budgets.

    The uncached samples, the drift, the costs and all rollouts are shared, so that each further budget costs its search
    alone. `effort` is for each budget.

    Args:
        model: as for `moeca_compile.calibrate`.
        sample: likewise, the caller's own loop, if no `prompts` are given.
        budgets: at least one, as `calibrate` takes them, such as `["macs:0.2", "macs:0.34", "macs:0.5"]`.
        **arguments: the other arguments of `calibrate`.

    Returns:
        The schedules. `predicted["trajectories"]` of each is the cost of the whole front. A budget that no schedule
        keeps is left out with a warning. Save the front with `save`, choose with `at("speedup:2")` or compile with
        `schedule="front.json@speedup:2"`.

    Raises:
        ScheduleError: as `calibrate`; also if there is no budget, or no schedule for any.
        CaptureError, OptionError: as `calibrate`.
    """
    if isinstance(budgets, str) or not budgets:
        raise ScheduleError(
            f"calibrate_front: budgets={short(budgets)}, expected several texts such as ['macs:0.2', 'macs:0.34']"
        )
    sample = sampler_of(model, sample, arguments.pop("prompts", None), arguments.pop("call", None), "calibrate_front")
    requests = [_request(model, sample, budget, arguments) for budget in budgets]
    requests.sort(key=_tightest)  # the drift of the cheapest schedule spans the most steps, and serves the others too
    chosen = bound_arguments(model, sample, budgets[0], arguments)
    goal = goal_of(chosen["truth"], model, sample, requests[0], chosen["granularity"])
    if chosen["progress"]:
        price = price_of(requests, chosen["granularity"], goal, sample)
        tell(price.line("calibrate_front", requests[0].folder is not None))
    schedules: list[Schedule] = []
    failures: list[str] = []
    with reported(requests[0], chosen["progress"]) as report_progress:

        def report(text: str, share: float) -> None:
            done = len(schedules) + len(failures)
            report_progress(f"{requests[done].text}: {text}", (done + share) / len(requests))

        studies = Studies(model, sample, chosen["inner"], goal, report)
        for request in requests:
            try:
                schedules.append(find_schedule(studies, request, chosen["granularity"]))
            except ScheduleError as error:
                if not _is_sampled(studies):
                    raise  # the model or the sampler is at fault, not the budget
                failures.append(str(error))
    if not schedules:
        raise ScheduleError("calibrate_front: no budget can be kept. " + " ".join(failures))
    for failure in failures:
        warn(f"calibrate_front leaves a budget out: {failure}")
    total = max(schedule.predicted["trajectories"] for schedule in schedules)
    costs = {"trajectories": total}
    return Front(tuple(replace(schedule, predicted={**schedule.predicted, **costs}) for schedule in schedules))


def bound_arguments(model: Any, sample: Sampler, budget: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `calibrate` for one budget, with their defaults."""
    bound = inspect.signature(calibrate).bind(model, sample, budget=budget, **arguments)
    bound.apply_defaults()
    return bound.arguments


def _request(model: Any, sample: Sampler, budget: str, arguments: dict[str, Any]) -> Request:
    bound = bound_arguments(model, sample, budget, arguments)
    return Request.read(**{name: value for name, value in bound.items() if name not in NOT_FOR_REQUESTS})


def _tightest(request: Request) -> float:
    return min(request.budget.macs or 1.0, request.budget.latency or 1.0)


def _is_sampled(studies: Studies) -> bool:
    return any(study.is_sampled for study in studies.by_granularity.values())
