"""Which schedules `benchmarks.policies` runs: whole regions, and on their full steps every policy and idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import moeca_compile as moeca
from benchmarks.policies_report import WHOLE
from examples import digits, dsmoe
from moeca_compile.planner.drift.branches import branch_drift
from moeca_compile.schedule import Act, Action, Control, Partial, Row, Schedule
from moeca_compile.schedule.adaptive import Adaptive

SCHEDULES = Path("examples/schedules")
STEPS, BLOCKS = 50, 6
MODELS: dict[str, Callable[[], Any]] = {"dit_moe": digits.load_model, "dsmoe": dsmoe.load_digits}
PREFIX = {"dit_moe": "digits", "dsmoe": "dsmoe"}
BUDGETS = {"52": 0.5178, "50": 0.5033, "34": 0.3443}
C, F = Action.COMPUTE, Action.FORECAST
KEYS = tuple(f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("attn", "moe"))
TAU = 0.04
CALIBRATED = f"calibrated with tau {TAU}, thinned"
MANY = "uniform:4"  # the schedule on which all policies and ideas are tried

# What a step between full ones does with attention and experts.
POLICIES: dict[str, tuple[Act, Act]] = {
    WHOLE: (F, F),
    "branches forecast, none computed": (F, Partial(0, 0)),
    "transitions: tau 0.02": (F, Partial(0, 0.02)),
    "transitions: tau 0.04": (F, Partial(0, 0.04)),
    "branches: tau 0.1": (F, Partial(0, 0.1)),
    "tokens, attention too: rho 0.1": (Partial(0.1), Partial(0.1)),
    "tokens and branches: rho 0.1, tau 0.04": (Partial(0.1, 0.04), Partial(0.1, 0.04)),
    "attention tokens only: rho 0.25": (Partial(0.25), F),
    "attention every step, experts whole": (C, F),
    "attention every step, tau 0.04": (C, Partial(0, 0.04)),
}
TRANSITIONS: Row = (F, Partial(0, TAU)) * BLOCKS


@dataclass(frozen=True)
class Idea:
    """The cheap rows after a full one, in turn, and what is computed first in them."""

    rows: tuple[Row, ...]
    control: Control = field(default_factory=Control)


@cache
def measured(model: str) -> dict[str, Any]:
    """How the model's layers and experts change along an uncached trajectory that no figure here is taken of."""
    sampler = import_module("examples.03_calibrate").sampler()
    found: dict[str, Any] = branch_drift(MODELS[model](), sampler, range(1))["regions"]
    return found


def of_experts(model: str, what: str) -> dict[str, list[float]]:
    """By MoE layer a figure of each of its experts."""
    return {key: one["by_expert"][what] for key, one in measured(model).items() if one["kind"] == "experts"}


def tau_by_layer(model: str) -> Idea:
    """Each layer's share of the computed branches is its share of the transitions."""
    rates = [one["overall"]["transitions"] for one in measured(model).values() if one["kind"] == "experts"]
    mean = sum(rates) / len(rates)
    return Idea((tuple(act for rate in rates for act in (F, Partial(0, round(TAU * rate / mean, 4)))),))


def sensitive(model: str) -> Idea:
    """Experts whose branches change more come first."""
    return Idea((TRANSITIONS,), Control(sensitivity=of_experts(model, "branches")))


def quotas(model: str) -> Idea:
    """Each expert's share of the computed branches is its share of the transitions."""
    moved = of_experts(model, "transitions")
    loads = of_experts(model, "load")
    parts = {key: [a * b for a, b in zip(moved[key], loads[key], strict=True)] for key in moved}
    return Idea((TRANSITIONS,), Control(quota={key: [p / sum(line) for p in line] for key, line in parts.items()}))


@cache
def thresholds(model: str, score: str, share: float) -> Idea:
    """Experts whose drift passed what it reaches in `share` of the cases come after the transitions."""
    plain = with_idea(bases(model)[MANY], Idea((TRANSITIONS,), Control(score)))
    sampler = import_module("examples.03_calibrate").sampler()
    found = moeca.expert_thresholds(MODELS[model](), sampler, plain, share=share, seeds=range(2))
    return Idea((TRANSITIONS,), found.control)


IDEAS: dict[str, Callable[[str], Idea]] = {
    "tau 0.04, scored by drift of the router": lambda model: Idea((TRANSITIONS,), Control("drift")),
    "tau 0.1, scored by drift of the router": lambda model: Idea(((F, Partial(0, 0.1)) * BLOCKS,), Control("drift")),
    "tau 0.04 and shared experts computed": lambda model: Idea(((F, Partial(0, 0.04, True)) * BLOCKS,)),
    "tau 0.04 on average, by each layer's transitions": tau_by_layer,
    "tau 0.04, experts that change more first": sensitive,
    "tau 0.04, quotas by each expert's transitions": quotas,
    "tau 0.04, experts past their threshold": lambda model: thresholds(model, "error", 0.25),
    "tau 0.04, experts past a high threshold": lambda model: thresholds(model, "error", 0.05),
    "tau 0.04, experts past their threshold, by drift": lambda model: thresholds(model, "drift", 0.25),
    "attention rows between, experts whole": lambda model: Idea(((F,) * len(KEYS), (C, F) * BLOCKS)),
    "attention rows between, tau 0.04": lambda model: Idea((TRANSITIONS, (C, Partial(0, 0.04)) * BLOCKS)),
}


def bases(model: str) -> dict[str, Schedule]:
    """Schedules of whole regions: uniform ones, and those that were calibrated."""
    found = {f"uniform:{k}": uniform(k) for k in (2, 3, 4, 6)}
    for budget in BUDGETS:
        path = SCHEDULES / file_of(model, budget, 0.0)
        if path.exists():
            found[f"calibrated for {budget} %"] = Schedule.load(path)
    return found


def uniform(interval: int) -> Schedule:
    """Two full steps, then every `interval`-th; order 1."""
    rows = tuple((C if step < 2 or (step - 1) % interval == 0 else F,) * len(KEYS) for step in range(STEPS))
    return Schedule(rows, KEYS, order=1, made_by=f"uniform:{interval}")


def with_idea(schedule: Schedule, idea: Idea) -> Schedule:
    """The schedule with the idea's rows, in turn after each full one, in the place of whole regions forecast."""
    rows: list[Row] = []
    cheap = 0
    for old in schedule.rows:
        if all(act is C for act in old):
            cheap = 0
            rows.append(old)
            continue
        wanted = idea.rows[cheap % len(idea.rows)]
        cheap += 1
        rows.append(tuple(new if act is F else act for act, new in zip(old, wanted, strict=True)))
    return replace(schedule, rows=tuple(rows), order=schedule.order or 1, control=idea.control)


def adaptive(
    threshold: float, *cheap: tuple[Act, Act], lower: tuple[float, ...] = (), control: Control | None = None
) -> Schedule:
    """Full steps from `threshold` on, then the cheap rows, each from its threshold in `lower` on but the last."""
    rows = (tuple([C] * len(KEYS)), *(one * BLOCKS for one in cheap))
    return Schedule(rows, KEYS, order=1, adaptive=Adaptive((threshold, *lower)), control=control or Control())


@cache
def jobs(model: str) -> list[tuple[str, str, Schedule]]:
    found = [(name, WHOLE, schedule) for name, schedule in bases(model).items()]
    for budget in BUDGETS:
        path = SCHEDULES / file_of(model, budget, TAU)
        if path.exists():
            found.append((f"calibrated for {budget} %", CALIBRATED, Schedule.load(path)))
    chosen = [*(name for name in bases(model) if name.startswith("calibrated")), "uniform:2", "uniform:4"]
    few = [one for one in POLICIES if one != WHOLE and not one.startswith(("tokens", "attention"))]
    for name in chosen:
        policies = [policy for policy in (POLICIES if name == MANY else few) if policy != WHOLE]
        found += [
            (name, policy, with_idea(bases(model)[name], Idea((POLICIES[policy] * BLOCKS,)))) for policy in policies
        ]
    found += [(MANY, idea, with_idea(bases(model)[MANY], idea_of(model))) for idea, idea_of in IDEAS.items()]
    past = thresholds(model, "error", 0.25).control
    for threshold in (0.02, 0.05):
        name, transitions = f"adaptive:{threshold}", (F, Partial(0, TAU))
        found += [
            (name, "adaptive, tau 0.04, experts past their threshold", adaptive(threshold, transitions, control=past)),
            (name, "adaptive, attention and tau 0.04 from half of it on",
             adaptive(threshold, (C, transitions[1]), transitions, lower=(threshold / 2,))),
        ]  # fmt: skip
        found.append((f"adaptive:{threshold}", "adaptive, whole regions", adaptive(threshold, (F, F))))
        found.append((f"adaptive:{threshold}", "adaptive, tau 0.04", adaptive(threshold, (F, Partial(0, 0.04)))))
    return found


def file_of(model: str, budget: str, branches: float) -> str:
    return f"{PREFIX[model]}_{budget}{'_branches' if branches else ''}.json"
