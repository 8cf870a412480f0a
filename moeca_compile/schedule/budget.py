"""Budgets: the limits of a schedule, as in `macs:0.26`, `latency:0.4`, `speedup:2`, `state:64MiB`, `psnr:45`.

Several limits are separated by commas.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moeca_compile.errors import ScheduleError
from moeca_compile.schedule.decode import short

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Budget:
    """The limits of one schedule; None: no limit.

    Attributes:
        macs: executed MACs / MACs of the uncached trajectory, in (0, 1].
        latency: time of the variants, summed over the steps / the same of the uncached trajectory, in (0, 1].
            `speedup:2` is another way to write `latency:0.5`.
        state_bytes: bytes of all cache tensors of one guidance stream.
        psnr_db: least PSNR in dB against the uncached samples. With it, the search looks for the cheapest schedule.
    """

    macs: float | None = None
    latency: float | None = None
    state_bytes: int | None = None
    psnr_db: float | None = None

    def __str__(self) -> str:
        """The text that `parse` reads."""
        limits = {"macs": self.macs, "latency": self.latency, "state": self.state_bytes, "psnr": self.psnr_db}
        return ",".join(f"{kind}:{limit:.12g}" for kind, limit in limits.items() if limit is not None)

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Read a budget.

        Args:
            text: such as "macs:0.26,state:64MiB".

        Returns:
            The limits.

        Raises:
            ScheduleError: an unknown kind of limit, a number out of range, a limit given twice, or none on the work.
        """
        if not isinstance(text, str):
            raise ScheduleError(f"budget is {short(text)}, expected a text such as 'macs:0.26' or 'speedup:2'")
        limits: dict[str, float] = {}
        for part in text.split(","):
            kind, _, amount = part.strip().partition(":")
            if kind not in ("macs", "latency", "speedup", "state", "psnr"):
                times = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[x×]", part.strip(), re.IGNORECASE)
                suggestion = f"; did you mean speedup:{times[1]}?" if times else ""
                raise ScheduleError(
                    f"budget {short(part.strip())}: expected macs:0.26, latency:0.4, speedup:2, state:64MiB or psnr:45"
                    f"{suggestion}"
                )
            if kind == "speedup":
                kind, amount = "latency", _latency(part, amount)
            if kind in limits:
                raise ScheduleError(f"budget {text!r} limits {kind} twice")
            limits[kind] = read_bytes(amount, "budget state:") if kind == "state" else _number(part, amount)
            if kind in ("macs", "latency") and not 0 < limits[kind] <= 1:
                raise ScheduleError(
                    f"budget {part.strip()!r}: a fraction of the uncached run, so above 0 and at most 1"
                )
        if not math.isfinite(limits.get("psnr", 0.0)):
            raise ScheduleError(f"budget {text!r}: psnr is a finite number of decibels")
        if "psnr" not in limits and not {"macs", "latency"} & limits.keys():
            raise ScheduleError(f"budget {text!r} doesn't limit the work: add macs:, latency:, speedup: or psnr:")
        state = int(limits["state"]) if "state" in limits else None
        return cls(limits.get("macs"), limits.get("latency"), state, limits.get("psnr"))


def _latency(part: str, amount: str) -> str:
    """The latency limit that is equivalent to a speedup, as text."""
    times = _number(part, amount)
    if not 1 <= times < math.inf:
        raise ScheduleError(f"budget {part.strip()!r}: how many times as fast as the uncached run, so at least 1")
    return repr(1 / times)


def _number(part: str, amount: str) -> float:
    try:
        return float(amount)
    except ValueError:
        raise ScheduleError(f"budget {part.strip()!r}: {amount!r} is not a number") from None


def read_bytes(amount: str, what: str) -> int:
    """A number of bytes such as 64MiB.

    Raises:
        ScheduleError: it is none; `what` stands before it in the message.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", amount)
    if match is None or match[2].lower() not in _UNITS:
        raise ScheduleError(f"{what}{amount}: expected bytes such as 64MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
