"""The page's section on samplers whose steps were placed offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers.tables import markdown
from benchmarks.protocol import when

HEAD = (
    "", "evaluations", "to uncached, dB", "worst 5 %", "to converged, dB", "worst 5 %", "less the uncached run",
)  # fmt: skip
INTRO = """
## Samplers that were searched

Nothing is cached here and nothing compiled: the sampler itself calls the network less often, at steps that were placed
offline. *Calibrated multistep* moves x between them by a combination of the last guided outputs; *fitted* weights are
least squares on recorded states. Times of Adams-Bashforth are placed against the converged solution, those of
calibrated multistep against the uncached run. Steps and weights are chosen on seeds 0 to 15, and told on other digits.
Means with 95 % intervals; the last column is paired by digit, to the converged solution. No time is told.
"""


def section(payload: Mapping[str, Any]) -> str:
    rows = []
    for row in payload["rows"]:
        near, exact, worst = row["psnr_db"]["uncached"], row["psnr_db"]["converged"], row["worst_5_percent_db"]
        lead, half = row["lead_over_uncached_db"]
        rows.append(
            [
                row["name"],
                str(row["evaluations"]),
                f"{near[0]:.1f} ± {near[1]:.1f}",
                f"{worst['uncached']:.1f}",
                f"{exact[0]:.1f} ± {exact[1]:.1f}",
                f"{worst['converged']:.1f}",
                f"{lead:+.1f} ± {half:.1f}",
            ]
        )
    machine = payload["machine"]
    told = f"{payload['digits']} digits; `python -m benchmarks.peers.searched`, {when(machine)}."
    return f"{INTRO}{told}\n\n{markdown(HEAD, rows)}\n"
