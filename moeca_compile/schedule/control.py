"""How a PARTIAL row chooses its tokens and branches: the expert-aware control, a part of the schedule. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.decode import Entries

SCORES = ("drift", "error")
TABLES = ("sensitivity", "threshold", "quota")
Weights = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Control:
    """What is recomputed first: by gate weight x what `score` says x the sensitivity of the expert.

    Attributes:
        score: `drift`: how far the input moved since the value was computed; `error`: how wrong the forecast was when
            the value was last computed, growing with its age.
        sensitivity: by region key, for each expert how much the sample suffers when it is stale; any scale, >= 0.
            A region that isn't named weighs all its experts alike.
        threshold: by region key, for each expert the drift from which on its branches come before those of other
            experts, after transitions: the mean of what `score` says over the branches of a sample that are routed to
            it and cached. As many branches are computed as without. `moeca_compile.expert_thresholds` measures them.
        quota: by region key, for each expert its share of the branches that a PARTIAL row may compute; they sum to at
            most 1. An expert's branches beyond its quota come after all others. Not named: no quotas.

    Raises:
        ScheduleError: a negative number, or quotas that sum to more than 1.
    """

    score: str = "error"
    sensitivity: Weights = field(default_factory=dict)
    threshold: Weights = field(default_factory=dict)
    quota: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ScheduleError(f"control: score is {self.score!r}, expected one of {', '.join(SCORES)}")
        for name in TABLES:
            tables = {key: tuple(float(w) for w in weights) for key, weights in getattr(self, name).items()}
            object.__setattr__(self, name, tables)
            for key, weights in tables.items():
                if not weights or not all(0 <= w < float("inf") for w in weights):
                    raise ScheduleError(f"control: {name} of {key}: {weights}, expected one number >= 0 an expert")
                if name == "quota" and sum(weights) > 1 + 1e-6:
                    raise ScheduleError(f"control: the quotas of {key} sum to {sum(weights):g}, at most 1 is there")

    def __hash__(self) -> int:
        return hash((self.score, *(tuple(table.items()) for table in self.tables.values())))

    @property
    def tables(self) -> dict[str, Weights]:
        """Each kind of table by its name."""
        return {name: getattr(self, name) for name in TABLES}

    def to_dict(self) -> dict[str, Any]:
        """Write the control as plain lists, for JSON.

        Returns:
            The score, and each table that is set.
        """
        plain = {name: {key: list(w) for key, w in table.items()} for name, table in self.tables.items() if table}
        return {"score": self.score, **plain}

    @classmethod
    def from_entries(cls, data: Entries) -> Control:
        """What `to_dict` gave.

        Raises:
            DecodeError, ScheduleError: an entry that isn't known or is of another type.
        """
        data.only(("score", *TABLES))
        tables = {name: data.entries(name, {}) for name in TABLES}
        lists = {name: {key: table.numbers(key) for key in table.data} for name, table in tables.items()}
        return cls(data.text("score", "error"), **lists)
