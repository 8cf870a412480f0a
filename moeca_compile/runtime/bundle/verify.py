"""Does a bundle still give what it gave where it was made? Golden inputs and outputs against this machine's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeca_compile.errors import BundleError
from moeca_compile.runtime.bundle.fused import FusedSession
from moeca_compile.runtime.session import Session
from moeca_compile.runtime.stats import StepRecord


@dataclass(frozen=True)
class Verdict:
    """`errors`: of each recorded step, the largest |difference| over the largest |recorded value|. `dropped`:
    branches that found no row in an expert's capacity."""

    provider: str
    errors: tuple[float, ...]
    variants: tuple[str, ...]
    tolerance: float
    recorded: float | None
    dropped: int = 0

    @property
    def error(self) -> float:
        return max(self.errors)

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        outcome = "as recorded" if self.passed else "NOT as recorded"
        where = f" ({self.recorded:.1e} where it was exported)" if self.recorded is not None else ""
        return (
            f"{outcome}: {len(self.errors)} golden steps on {self.provider}, variants {', '.join(self.variants)}, "
            f"largest relative error {self.error:.1e}{where}, tolerance {self.tolerance:.0e}"
        )


def verify(session: Session | FusedSession) -> Verdict:
    """Run the golden trajectory, one for each size, and compare.

    Raises:
        BundleError: the golden file doesn't fit the model.
    """
    errors: list[float] = []
    records: list[StepRecord] = []
    for bundle in (session.bundle, *session.bundle.sizes):
        inputs, outputs = bundle.golden()
        with session.trajectory() as trajectory:
            for step, (call, expected) in enumerate(zip(inputs, outputs, strict=True)):
                results = trajectory.run(call)
                for name, array in expected.items():
                    if array.shape != results[name].shape:
                        shape = results[name].shape
                        raise BundleError(f"golden step {step}: {name} has shape {array.shape}, not {shape}")
                errors.append(max(relative_error(results[name], array) for name, array in expected.items()))
            records += trajectory.records
    ran = tuple(dict.fromkeys(record.variant for record in records))
    dropped = sum(record.dropped for record in records)
    golden = session.manifest.golden
    recorded = [run.relative_error for run in golden.measured if run.provider == session.provider]
    return Verdict(session.provider, tuple(errors), ran, golden.tolerance, recorded[0] if recorded else None, dropped)


def relative_error(result: Any, recorded: Any) -> float:
    """max |result - recorded| / max |recorded|, in float64; infinite where either isn't finite."""
    result, recorded = np.asarray(result, np.float64), np.asarray(recorded, np.float64)
    if not (np.isfinite(result).all() and np.isfinite(recorded).all()):
        return float("inf")
    if not recorded.size:
        return 0.0
    return float(np.abs(result - recorded).max() / max(np.abs(recorded).max(), 1e-30))
