"""The output rule: what the model returns at each step, as a weighted sum that was fitted offline. Pure data, no torch.

At a computed step and at a cheap one alike, what the caller gets is a sum over some of these values, one weight each:

- `y0` to `y3`: the model's outputs at the last steps that computed it, latest first (`y0` of a computed step is the
  output of that step);
- `x`: the latent that the call came with;
- `d0` to `d3`: of `y0` to `y3`, the first half of the batch less the second, for both halves: the guidance difference
  where guidance takes both halves in one batch.

A rule is made for the steps of one schedule, in their order. Where a call comes at another timestep, or after another
history, the schedule's polynomial serves instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.action import Action, Row
from moeca_compile.schedule.decode import Entries
from moeca_compile.schedule.granularity import OUTPUT

UNCACHED, CONVERGED, GIVEN = TRUTHS = ("uncached", "converged", "given")
MAX_OUTPUTS = 4  # that a sum takes: y0 to y3


@dataclass(frozen=True)
class OutputRule:
    """Weights by step and term.

    Attributes:
        terms: names of the values, in the order of the weights.
        weights: [steps][terms]; a step's may be empty: there the output is what the schedule's order makes it.
        truth: what the weights were fitted to: `uncached`, the sampler's own states when everything is computed;
            `converged`, the states that the same sampler comes to with more and more steps; or `given`, samples of the
            user's.
        update: of the sampler's first step: the factors of the latent, and of each part of what the model returns, that
            make the next latent. Runs compare it, so that another guidance or solver is noticed. Empty: unknown.

    Raises:
        ScheduleError: an unknown term or truth, an update of another length, a step with another number of weights, a
            weight that isn't finite.
    """

    terms: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    truth: str = "uncached"
    update: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        unknown = [term for term in self.terms if not re.fullmatch(rf"x|[yd][0-{MAX_OUTPUTS - 1}]", term)]
        if unknown or len(set(self.terms)) < len(self.terms):
            raise ScheduleError(f"output: terms are {list(self.terms)}, expected y0 to y3, x, d0 to d3, each once")
        for step, row in enumerate(self.weights):
            if row and len(row) != len(self.terms):
                raise ScheduleError(f"output: step {step} has {len(row)} weights for {len(self.terms)} terms")
            if not all(map(math.isfinite, row)):
                raise ScheduleError(f"output: step {step} has a weight that isn't finite")
        if len(self.update) not in (0, 2, 3) or not all(map(math.isfinite, self.update)):
            raise ScheduleError(
                f"output: update is {list(self.update)}, expected the factors of the latent and of one or two parts of "
                "the output"
            )
        if self.truth not in TRUTHS:
            raise ScheduleError(f"output: truth is {self.truth!r}, expected one of {', '.join(TRUTHS)}")

    def check_rows(self, rows: int, columns: int, is_open: bool, granularity: str) -> None:
        """Check that the rule fits a schedule.

        Args:
            rows, columns: the numbers of the schedule's rows and columns.
            is_open: whether the schedule repeats or adapts, so that its steps aren't known.
            granularity: the schedule's.

        Raises:
            ScheduleError: it doesn't fit.
        """
        if len(self.weights) != rows or is_open:
            raise ScheduleError(
                f"output: weights of {len(self.weights)} steps for {rows} rows. It takes weights for each step, and a "
                "schedule that neither repeats nor adapts"
            )
        if granularity != OUTPUT or columns != 1:
            raise ScheduleError(
                f"output: granularity is {granularity!r} with {columns} columns. Weights of the model's output are for "
                "granularity 'output', which has one column"
            )

    def check_step(self, step: int, outputs: int) -> None:
        """Check that a step weighs only outputs that are there.

        Args:
            step: from 0.
            outputs: how often the model was computed by then.

        Raises:
            ScheduleError: it weighs another one.
        """
        for term, weight in zip(self.terms, self.weights[step], strict=False):
            if weight and term != "x" and int(term[1]) >= outputs:
                raise ScheduleError(
                    f"output: step {step} weighs {term}, but the model was computed {outputs} times by then"
                )

    def check_history(self, rows: Sequence[Row]) -> None:
        """Check that each step of a schedule weighs only outputs that are there.

        Args:
            rows: of the schedule, each of one column.

        Raises:
            ScheduleError: a step weighs another one.
        """
        computed = 0
        for step, row in enumerate(rows):
            computed += row[0] is Action.COMPUTE
            self.check_step(step, computed)

    @property
    def depth(self) -> int:
        """How many of the model's outputs are kept for it."""
        return max((int(term[1]) + 1 for term in self.terms if term != "x"), default=0)

    @property
    def halves(self) -> bool:
        """Whether it takes the two halves of a batch apart."""
        return any(term.startswith("d") for term in self.terms)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_entries` reads it."""
        weights = [list(row) for row in self.weights]
        return {"terms": list(self.terms), "truth": self.truth, "update": list(self.update), "weights": weights}

    @classmethod
    def from_entries(cls, data: Entries) -> OutputRule:
        """Read `to_dict`'s entries.

        Raises:
            ScheduleError: an entry is missing or malformed.
        """
        data.reject_unknown(("terms", "truth", "update", "weights"))
        rows = data.get("weights")
        if not isinstance(rows, list):
            raise ScheduleError("output: weights is no list of rows")
        weights = tuple(Entries({"weights": row}).numbers("weights") for row in rows)
        return cls(data.texts("terms"), weights, data.text("truth"), data.numbers("update", []))


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """Of the weights of a schedule; it prints as one line.

    Attributes:
        truth: what they were fitted to: `uncached`, `converged` or `given`.
        computed: how many steps that compute the model have weights.
        cheap: how many others have some.
        terms: what they weigh: `x`, the latent; `y0`, ..., the model's last outputs; `d0`, ..., guidance differences.
        corrects_solver: they bring the samples nearer to another truth than the uncached samples, so these differ.
    """

    truth: str
    computed: int
    cheap: int
    terms: tuple[str, ...]
    corrects_solver: bool

    @classmethod
    def of(cls, rule: OutputRule | None, rows: Sequence[Row]) -> OutputFacts | None:
        """Of a schedule's rule and its rows, each of one column. None: it has no rule."""
        if rule is None:
            return None
        computes = [row[0] is Action.COMPUTE for row, weights in zip(rows, rule.weights, strict=True) if weights]
        weighed = [term for place, term in enumerate(rule.terms) if any(row and row[place] for row in rule.weights)]
        terms = tuple(sorted(weighed, key=lambda term: ("xyd".index(term[0]), term)))
        return cls(rule.truth, sum(computes), len(computes) - sum(computes), terms, rule.truth != UNCACHED)

    def __str__(self) -> str:
        truth = f"{self.truth} samples" if self.truth == GIVEN else self.truth
        line = (
            f"output weights: fitted to {truth}, at {self.computed} computed and {self.cheap} cheap steps, of "
            f"{', '.join(self.terms) or 'nothing'}"
        )
        if self.truth == GIVEN:
            return f"{line}; they bring samples nearer to these, so samples differ from the uncached ones"
        return line + "; corrects the solver too, so samples differ from the uncached ones" * self.corrects_solver
