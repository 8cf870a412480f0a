"""What a schedule's output weights are, for people and for JSON. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.schedule.action import Action, Row
from moeca_compile.schedule.output import GIVEN, UNCACHED, OutputRule


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
