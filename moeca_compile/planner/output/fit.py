"""Weights of the output rule, fitted so that the sampler's latents come nearest to wanted ones.

The weights of a step have a closed form: ridge least squares from the terms' effect on the next latent to the wanted
next latent, over all trajectories together. Steps are fitted one after the other, each from the latent that the weights
before it lead to. The outputs of computed steps are those along the wanted trajectories. Where the fitted latent is off
the wanted one, the model returns something else, and great weights of opposite sign would magnify the difference. So
each weight is held back by the error that is to be expected of its term: the latent's error at the step of the output,
times `Form.response`. This is ridge regression for errors in the variables. Sources: Fuller, Measurement Error Models,
1987, section 1.2; Hoerl & Kennard, Ridge Regression, Technometrics 12 (1970).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeca_compile.errors import ScheduleError
from moeca_compile.planner.output.gram import Array, Gram, Value
from moeca_compile.planner.output.sampler import SamplerStep
from moeca_compile.schedule.output import MAX_OUTPUTS

Weights = tuple[tuple[float, ...], ...]  # [steps][terms]


@dataclass(frozen=True)
class Form:
    """What is fitted.

    Attributes:
        terms: of the output rule.
        response: mean square of the change of an output over that of the latent's, without unit.
    """

    terms: tuple[str, ...]
    response: float


RESPONSES = (0.1, 1.0, 10.0, 100.0)  # that rollouts decide between
SAMPLES_PER_TERM = 2  # at least; each has thousands of numbers
NOTHING = 1e-13  # of the greatest square: what rounding in float32 leaves
FLOOR = 1e-8  # of a term's mean square, that holds its weight back in any case


def term_sets(has_halves: bool) -> list[tuple[str, ...]]:
    """The terms that held-out seeds decide between. `has_halves`: guidance takes both halves in one batch."""
    sets: list[tuple[str, ...]] = [("x", "y0", "y1"), ("x", "y0", "y1", "y2")]
    if has_halves:
        sets.append(("x", "y0", "y1", "y2", "d0", "d1"))
    return sets


def check_enough(samples: int, has_halves: bool) -> None:
    """Refuse to fit to a few samples.

    Args:
        samples: of all seeds together.
        has_halves: as for `term_sets`.

    Raises:
        ScheduleError: they are too few for the number of weights.
    """
    terms = max(map(len, term_sets(has_halves)))
    if samples < SAMPLES_PER_TERM * terms:
        raise ScheduleError(
            f"calibrate: {samples} samples are too few to fit {terms} weights a step; at least "
            f"{SAMPLES_PER_TERM * terms} are needed. Give more seeds"
        )


@dataclass(frozen=True)
class _Output:
    """An output of the model by part of the guidance, and the mean square error of the latent that it was made from."""

    parts: Sequence[Array]
    error: float


@dataclass(frozen=True)
class _Place:
    """Before a step: the latent, the parts of the last returned output, and the kept outputs, latest first."""

    latent: Array
    last: Sequence[Array]
    outputs: Sequence[_Output]


@dataclass(frozen=True)
class FittedWeights:
    """A fit.

    Attributes:
        computed: whether each step computes the model.
        weights: of each step.
        miss: the final latent less the wanted one, as weights over a gram's vectors. Its mean square on a gram is the
            error of the samples on that gram's trajectories, as far as outputs don't depend on the latent's error.
        places: before each step.
    """

    computed: tuple[bool, ...]
    weights: Weights
    miss: Array
    places: Sequence[_Place]


class OutputFit:
    """The fit for one sampler.

    Args:
        sampler: the update of each step.
        rows: for each step, as how many steps it is held back that share its weights evenly; default: one.
    """

    def __init__(self, sampler: Sequence[SamplerStep], rows: Sequence[int] = ()) -> None:
        self.sampler, self.steps = sampler, len(sampler)
        # how much of an output's mean square reaches the next latent, if its parts are alike
        self.gains = [sum(step.now) ** 2 / count for step, count in zip(sampler, rows or [1] * self.steps, strict=True)]

    def fit(
        self, gram: Gram, computed: Sequence[bool], form: Form, near: Sequence[FittedWeights] = ()
    ) -> FittedWeights:  # fmt: skip
        """The weights of each step.

        Args:
            gram: has the outputs of the computed steps.
            computed: whether each step computes the model.
            form: terms and response.
            near: other fits of this form to this gram. The steps before the first difference aren't fitted again.
        """
        places, weights = [_Place(gram.vector("begin"), (), ())], []
        if near:
            shared, other = max(((_shared(fit.computed, computed), fit) for fit in near), key=lambda pair: pair[0])
            places, weights = list(other.places[: shared + 1]), list(other.weights[:shared])
        for step in range(len(weights), self.steps):
            row, place = self._step(gram, step, computed[step], form, places[-1])
            weights.append(row)
            places.append(place)
        miss = places[-1].latent - gram.vector("wanted", self.steps)
        return FittedWeights(tuple(computed), tuple(weights), miss, places)

    def _step(
        self, gram: Gram, step: int, computes: bool, form: Form, place: _Place
    ) -> tuple[tuple[float, ...], _Place]:  # fmt: skip
        """The weights of one step, and the place before the next one."""
        sampler, outputs = self.sampler[step], place.outputs
        parts = range(len(sampler.now))
        if computes:
            error = gram.square(place.latent - gram.made_at(step))
            new = _Output([gram.vector("output", step, part) for part in parts], error)
            outputs = (new, *outputs[: MAX_OUTPUTS - 1])
        known = [output.parts for output in outputs]
        terms = {name: term_parts(name, place.latent, known, len(parts)) for name in form.terms}
        terms = {name: term for name, term in terms.items() if term}  # an output that isn't there yet has none
        constant = sampler.constant(place.latent, place.last)
        columns = np.stack([sampler.effect(term) for term in terms.values()])
        products = columns @ gram.products
        normal, right = products @ columns.T, products @ (gram.vector("wanted", step + 1) - constant)
        expected = np.array([_error(name, outputs) for name in terms]) * gram.numbers * self.gains[step]
        scale = scales(np.diag(normal))
        scaled = normal / np.outer(scale, scale) + np.diag(form.response * expected / scale**2 + FLOOR)
        solved = dict(zip(terms, (np.linalg.solve(scaled, right / scale) / scale).tolist(), strict=True))
        returned = [sum(solved[name] * term[part] for name, term in terms.items()) for part in parts]
        latent = constant + sampler.effect(returned)
        row = tuple(solved.get(name, 0.0) for name in form.terms)
        return row, _Place(latent, returned, outputs)


def scales(squares: Array) -> Array:
    """The units of weights in which their effects are alike. Infinite where the effect is nothing but rounding, as that
    of the difference of parts that are alike: such a term gets no weight.

    Args:
        squares: of the effects [weights].
    """
    return np.where(squares > NOTHING * squares.max(), np.sqrt(squares.clip(0.0)), np.inf)


def term_parts(name: str, latent: Value, outputs: Sequence[Sequence[Value]], parts: int) -> Sequence[Value]:
    """A term of the output rule, by part of the guidance; empty where its output isn't there yet.

    Args:
        name: of the term.
        latent: of the step.
        outputs: the parts of each output that is kept, latest first.
        parts: how many the guidance has.
    """
    if name == "x":
        return [latent] * parts
    number = int(name[1:])
    if number >= len(outputs):
        return ()
    output = outputs[number]
    return output if name[0] == "y" else [output[0] - output[1]] * parts


def _error(name: str, outputs: Sequence[_Output]) -> float:
    """The mean square error of the latent that a term was made from; the latent itself has none."""
    return 0.0 if name == "x" else outputs[int(name[1:])].error


def _shared(one: Sequence[bool], other: Sequence[bool]) -> int:
    """How many first steps are alike."""
    for step, (first, second) in enumerate(zip(one, other, strict=True)):
        if first != second:
            return step
    return len(one)
