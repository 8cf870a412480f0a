"""What a calibration measured, as lines and points for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeca_compile.schedule import Schedule

TRIED = "tried "  # how `calibrate` names, in `Schedule.predicted`, the best of each family of schedules


@dataclass(frozen=True)
class Measured:
    """What a calibration measured, for the drift plot and the front.

    Attributes:
        drift: by name one number a step: how far the latent is moved where older outputs stand in for a step's own;
            the root mean square over the samples, projected. nan: it wasn't measured.
        front: by name of a predictor, points (fraction of the MACs, mean PSNR in dB to the uncached samples), one a
            schedule that was sampled.
    """

    drift: Mapping[str, Sequence[float]] = field(default_factory=dict)
    front: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def tried(schedule: Schedule) -> list[dict[str, str | float]]:
    """The best PSNR in dB that each family of schedules reached within the schedule's budget, the best first."""
    families = {name.removeprefix(TRIED): value for name, value in schedule.predicted.items() if name.startswith(TRIED)}
    return [{"name": name, "psnr_db": families[name]} for name in sorted(families, key=lambda name: -families[name])]
