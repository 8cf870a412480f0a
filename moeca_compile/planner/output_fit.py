"""Weights of the output rule (`schedule/output.py`), fitted so that the sampler's states come nearest to wanted ones.

Of almost every deterministic sampler the next state is linear in the state, in what the model returned now, and in what
it returned a step before. These few numbers a step are read off the uncached runs (`SamplerStep`). Then the weights of
a step have a closed form: ridge least squares from the terms' effect on the next state to the wanted next state, over
all seeds together. Steps are fitted one after the other, each from the states that the weights before it lead to. The
model's outputs at computed steps belong to the states of the last rollout; so rollout and fit take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.rollout import Call, SampledModel
from moeca_compile.schedule import Action, Schedule
from moeca_compile.schedule.output import OutputRule

ROUNDS = 3  # of rollout and fit
CHECKED = 4  # one seed in so many isn't fitted to
FINER = 8  # times the steps of a converged run
RIDGE = 1e-7  # of the terms' mean square
UNEXPLAINED = 1e-2  # of a state's change that a linear sampler may leave, as a ratio of norms
SAMPLES_PER_TERM = 2  # at least; each has thousands of numbers


@dataclass
class Path:
    """One trajectory.

    Attributes:
        states: the latents [N, C, ...] float32 that each step began with, and the final samples.
        outputs: by step that computed the model, what it returned [B, C', ...] float32; B is N, or 2 N where guidance
            takes both halves of a batch.
        timesteps: of each step.
    """

    states: list[Tensor] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    timesteps: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class SamplerStep:
    """next state = keep x state + sum over the batch's halves of (now x output + before x the last step's output)."""

    keep: float
    now: tuple[float, ...]
    before: tuple[float, ...]

    def constant(self, state: Tensor, last: Sequence[Tensor]) -> Tensor:
        """What the next state has without this step's output."""
        total = self.keep * state
        for weight, output in zip(self.before, last, strict=False):
            total = total + weight * output[:, : state.shape[1]]
        return total

    def effect(self, parts: Sequence[Tensor], channels: int) -> Tensor:
        """What an output, or a term of it, adds to the next state. `parts`: its halves."""
        return sum((weight * part[:, :channels] for weight, part in zip(self.now, parts, strict=True)), torch.zeros(()))


def record_path(sampled: SampledModel, seed: int, schedule: Schedule | None = None) -> Path:
    """Sample a seed (None: uncached) and keep what the fit needs.

    Raises:
        ScheduleError: the sampler calls the model several times a step, or no input was found to be its latent.
    """
    path = Path()

    def watch(call: Call) -> None:
        if call.latent is None or call.state is None or call.record.step != len(path.states):
            raise ScheduleError(
                "calibrate: the output's weights are fitted for samplers that call the model once a step, with its "
                "latent as a tensor argument. Take both halves of the guidance in one batch, or leave truth and "
                "granularity='output' out"
            )
        path.states.append(call.latent.detach().float().cpu().clone())
        path.timesteps.append(call.timestep)
        if call.state.history[0][:1] == (call.record.step,):
            path.outputs[call.record.step] = call.state.tensors[0].detach().float().cpu().clone()

    path.states.append(sampled.run(seed, schedule, watch))
    return path


class OutputFit:
    """The fit for one sampler.

    Args:
        uncached: a path of each seed.
        rows: of the schedule.
        targets: of each seed the wanted states: of every step, and the final samples.

    Raises:
        ScheduleError: the sampler isn't linear in what the model returns, states don't fit each other, or the seeds
            are too few.
    """

    def __init__(self, uncached: Sequence[Path], computed: Sequence[bool], targets: Sequence[Sequence[Tensor]]) -> None:
        first = uncached[0].states[0]
        self.computed, self.steps = computed, len(computed)
        self.halves = 1 + all(len(p.states[0]) % 2 == 0 and _twice(p.states[0]) for p in uncached)
        self.channels = first.shape[1]
        self.targets = [[self._one_half(state) for state in states] for states in targets]
        self.terms = ("x", "y0", "y1", "y2", *(("d0", "d1") if self.halves == 2 else ()))
        samples = sum(len(states[0]) for states in self.targets)
        if samples < SAMPLES_PER_TERM * len(self.terms):
            raise ScheduleError(
                f"calibrate: {samples} samples are too few to fit {len(self.terms)} weights a step; at least "
                f"{SAMPLES_PER_TERM * len(self.terms)} are needed. Give more seeds"
            )
        self.sampler = [self._sampler_step(uncached, step) for step in range(self.steps)]

    def fit(self, paths: Sequence[Path]) -> tuple[tuple[float, ...], ...]:
        """Weights [steps][terms], given the model's outputs at the computed steps of `paths`."""
        states = [self._one_half(path.states[0]) for path in paths]
        history: list[list[Tensor]] = [[] for _ in paths]
        last: list[Sequence[Tensor]] = [() for _ in paths]
        weights = []
        for step in range(self.steps):
            sampler = self.sampler[step]
            if self.computed[step]:
                history = [[path.outputs[step], *kept[:2]] for path, kept in zip(paths, history, strict=True)]
            values = [self._values(state, kept) for state, kept in zip(states, history, strict=True)]
            constants = [sampler.constant(state, before) for state, before in zip(states, last, strict=True)]
            columns = [
                {term: sampler.effect(parts, self.channels) for term, parts in terms.items()} for terms in values
            ]
            wanted = [target[step + 1] - constant for target, constant in zip(self.targets, constants, strict=True)]
            solved = _ridge(columns, wanted)
            weights.append(tuple(solved.get(term, 0.0) for term in self.terms))
            last = [
                [sum(solved[term] * parts[half] for term, parts in terms.items()) for half in range(self.halves)]  # type: ignore[misc]
                for terms in values
            ]
            states = [
                constant + sampler.effect(returned, self.channels)
                for constant, returned in zip(constants, last, strict=True)
            ]
        return tuple(weights)

    def _values(self, state: Tensor, kept: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        """Each term that is known at a step, by halves."""
        values: dict[str, Sequence[Tensor]] = {}
        for number, output in enumerate(kept):
            halves = output.chunk(self.halves)
            values[f"y{number}"] = halves
            if self.halves == 2 and number < 2:
                values[f"d{number}"] = [halves[0] - halves[1]] * 2
        shape = [len(state), kept[0].shape[1] - self.channels, *state.shape[2:]]
        padded = torch.cat([state, state.new_zeros(shape)], dim=1)  # a learned variance has channels of its own
        values["x"] = [padded] * self.halves
        return values

    def _one_half(self, state: Tensor) -> Tensor:
        return state.chunk(2)[0] if self.halves == 2 and len(state) % 2 == 0 and _twice(state) else state

    def _sampler_step(self, paths: Sequence[Path], step: int) -> SamplerStep:
        """From the uncached runs, by least squares: first without the step before, then with it."""
        for memory in (False, True) if step else (False,):
            rows, wanted, moved = [], [], 0.0
            for path in paths:
                now, after = self._one_half(path.states[step]), self._one_half(path.states[step + 1])
                if now.shape != after.shape:
                    raise ScheduleError(
                        f"calibrate: the state after step {step} has shape {list(after.shape)}, the one before it "
                        f"{list(now.shape)}. To fit the output's weights, sample(model, seed) must return the last "
                        "latent"
                    )
                outputs = [*path.outputs[step].chunk(self.halves)]
                outputs += path.outputs[step - 1].chunk(self.halves) if memory else []
                rows.append(torch.stack([now.flatten(), *(one[:, : self.channels].flatten() for one in outputs)], 1))
                wanted.append(after.flatten())
                moved += float((after - now).square().sum())
            matrix, right = torch.cat(rows).double(), torch.cat(wanted).double()
            solved = torch.linalg.lstsq(matrix, right[:, None], driver="gelsd").solution[:, 0]
            left = float((matrix @ solved - right).square().sum())
            if left <= UNEXPLAINED**2 * moved:
                keep, *others = solved.tolist()
                return SamplerStep(keep, tuple(others[: self.halves]), tuple(others[self.halves :]))
        raise ScheduleError(
            f"calibrate: step {step} of the sampler isn't linear in what the model returns (it leaves "
            f"{(left / max(moved, 1e-30)) ** 0.5:.1%} of the state's change unexplained), so the output's weights "
            "can't be fitted. A sampler that draws noise at its steps is one; use its deterministic form"
        )


def fit_rule(
    sampled: SampledModel, schedule: Schedule, uncached: Sequence[Path], targets: Sequence[Sequence[Tensor]],
    seeds: Sequence[int], truth: str,
) -> tuple[Schedule, list[Path]]:  # fmt: skip
    """Fit the weights, on three of four seeds; the others decide after which round they are best.

    Args:
        schedule: of granularity `output`, one row per step.
        uncached: the path of each seed.
        targets: of each seed the wanted state at each step, and the wanted samples.
        truth: what the targets are, for the schedule's file.

    Returns:
        The schedule with its weights, and with it the path of each seed.

    Raises:
        ScheduleError: as for `OutputFit`.
    """
    count = max(1, len(seeds) - len(seeds) // CHECKED)
    computed = [row[0] is Action.COMPUTE for row in schedule.rows]
    fit, paths = OutputFit(uncached[:count], computed, targets[:count]), list(uncached[:count])
    best, least = (schedule, list(uncached)), float("inf")
    for _ in range(ROUNDS):
        candidate = replace(schedule, output=OutputRule(fit.terms, fit.fit(paths), truth))
        every = [record_path(sampled, seed, candidate) for seed in seeds]
        paths = every[:count]
        error = _error(every[count:] or every, targets[count:] or targets)
        if error < least:
            best, least = (candidate, every), error
    return best


def converged_path(sampled: SampledModel, seed: int, sampler: Callable[..., Tensor], grid: Path) -> list[Tensor]:
    """The states of the same sampler with `FINER` times the steps, at the timesteps of `grid`, and its samples."""
    steps = len(grid.timesteps)
    plain, counted, timed = sampled.sample, sampled.steps, len(sampled.uncached)
    sampled.sample = lambda model, seed: sampler(model, seed, steps=FINER * steps)
    try:
        fine = record_path(sampled, seed)
    finally:
        sampled.sample, sampled.steps = plain, counted
        del sampled.uncached[timed:]
    times = [0.0 if time is None else time for time in fine.timesteps]
    states = []
    for time in grid.timesteps:
        assert time is not None  # a latent without a timestep isn't recorded
        nearest = sorted(range(len(times)), key=lambda i: abs(times[i] - time))[:2]
        one, other = nearest
        share = (time - times[one]) / (times[other] - times[one])
        states.append(fine.states[one] + share * (fine.states[other] - fine.states[one]))
    return [*states, fine.states[-1]]


def _ridge(columns: Sequence[dict[str, Tensor]], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Least squares over all seeds, each column scaled to mean square 1 and held back by `RIDGE`."""
    terms = list(columns[0])
    matrix = torch.cat([torch.stack([column[term].flatten() for term in terms], 1) for column in columns]).double()
    right = torch.cat([one.flatten() for one in wanted]).double()
    scale = matrix.square().mean(0).sqrt().clamp_min(1e-30)
    scaled = matrix / scale
    gram = scaled.T @ scaled + RIDGE * len(scaled) * torch.eye(len(terms), dtype=torch.float64)
    solved = torch.linalg.solve(gram, scaled.T @ right) / scale
    return dict(zip(terms, solved.tolist(), strict=True))


def _error(paths: Sequence[Path], targets: Sequence[Sequence[Tensor]]) -> float:
    """Mean squared error of the final samples."""
    errors = [
        float((path.states[-1] - states[-1]).square().mean()) for path, states in zip(paths, targets, strict=True)
    ]
    return sum(errors) / len(errors)


def _twice(state: Tensor) -> bool:
    first, second = state.chunk(2)
    return torch.equal(first, second)
