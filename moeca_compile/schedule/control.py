"""Expert-aware control: how a PARTIAL row chooses its tokens and expert branches. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.decode import Entries

SCORES = ("drift", "error")
EXACT, NARROW = KEPT = ("exact", "bfloat16")
TABLES = ("sensitivity", "threshold", "quota")
Weights = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Control:
    """Priorities of a PARTIAL row. Branches are ranked by gate weight x score x sensitivity of the expert.

    Attributes:
        score: `drift`: how far the input has moved since the value was computed; `error`: the error of the forecast
            when the value was last computed, growing with the age of the value.
        sensitivity: by region key, one weight >= 0 per expert, on any scale: how much the sample suffers if the expert
            is stale. A region without an entry weighs all its experts equally.
        threshold: by region key, one score per expert. An expert whose mean score reaches its threshold comes before
            the other experts, after transitions. The mean is over the branches of a sample that are routed to the
            expert and cached. The number of computed branches does not change. `moeca_compile.expert_thresholds`
            measures thresholds.
        quota: by region key, for each expert its fraction of the branches that a PARTIAL row may compute; the sum is
            at most 1. Branches of an expert beyond its quota come last. A region without an entry has no quotas.
        kept: `exact`: expert branches are kept in the model's dtype and their differences in at least float32;
            `bfloat16`: both in bfloat16, which halves what a float32 model's step reads of them. What a step computes
            goes into its result unrounded.

    Raises:
        ScheduleError: a number is negative, or quotas sum to more than 1.
    """

    score: str = "error"
    sensitivity: Weights = field(default_factory=dict)
    threshold: Weights = field(default_factory=dict)
    quota: Weights = field(default_factory=dict)
    kept: str = EXACT

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ScheduleError(f"control: score is {self.score!r}, expected one of {', '.join(SCORES)}")
        if self.kept not in KEPT:
            raise ScheduleError(f"control: kept is {self.kept!r}, expected one of {', '.join(KEPT)}")
        for name in TABLES:
            tables = {key: tuple(float(w) for w in weights) for key, weights in getattr(self, name).items()}
            object.__setattr__(self, name, tables)
            for key, weights in tables.items():
                if not weights or not all(0 <= w < float("inf") for w in weights):
                    raise ScheduleError(f"control: {name} of {key}: {weights}, expected one number >= 0 an expert")
                if name == "quota" and sum(weights) > 1 + 1e-6:
                    raise ScheduleError(f"control: the quotas of {key} sum to {sum(weights):g}, at most 1 is there")

    def __hash__(self) -> int:
        return hash((self.score, self.kept, *(tuple(table.items()) for table in self.tables.values())))

    @property
    def tables(self) -> dict[str, Weights]:
        """Each kind of table by its name."""
        return {name: getattr(self, name) for name in TABLES}

    def to_dict(self) -> dict[str, Any]:
        """Write the control as plain lists, for JSON.

        Returns:
            The score, and each table that is set; how branches are kept where that isn't exactly.
        """
        plain = {name: {key: list(w) for key, w in table.items()} for name, table in self.tables.items() if table}
        kept = {} if self.kept == EXACT else {"kept": self.kept}
        return {"score": self.score, **plain, **kept}

    @classmethod
    def from_entries(cls, data: Entries) -> Control:
        """Decode what `to_dict` returned.

        Raises:
            DecodeError: an entry is unknown or of another type.
            ScheduleError: a value is out of range.
        """
        data.reject_unknown(("score", *TABLES, "kept"))
        tables = {name: data.entries(name, {}) for name in TABLES}
        lists = {name: {key: table.numbers(key) for key in table.data} for name, table in tables.items()}
        return cls(data.text("score", "error"), kept=data.text("kept", EXACT), **lists)
