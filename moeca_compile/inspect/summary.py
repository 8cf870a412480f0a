"""The summary of a compiled model in a few lines: regions, rejected candidates, programs, share of the MACs, state."""

from __future__ import annotations

from collections import Counter

from moeca_compile.inspect.report import Report
from moeca_compile.schedule import Schedule

MAX_REJECTED = 3  # that are listed


def summary(report: Report, model: str) -> str:
    """The lines that are logged at the first call.

    Args:
        report: of the model's graph.
        model: name of the model's class.
    """
    kinds = Counter(region.kind for region in report.regions)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines = [f"{model}: {len(report.regions)} regions in one graph ({counts or 'none'})"]
    rejected = report.rejected
    lines += [f"left alone: {candidate}" for candidate in rejected[:MAX_REJECTED]]
    if len(rejected) > MAX_REJECTED:
        lines.append(f"and {len(rejected) - MAX_REJECTED} more candidates left alone")
    lines.append(_programs(report))
    lines.append(f"state: {report.state_bytes / 2**20:.2f} MiB a stream")
    lines.append(
        "next: moeca_compile.stats(model) after a run: steps and times; explain(model): each region, and reasons; "
        "compare(model, sample): speedup and PSNR"
    )
    lines.append('(logged once; logging.getLogger("moeca_compile").setLevel("WARNING") hides it)')
    return "\n".join(f"moeca_compile: {line}" for line in lines)


def _programs(report: Report) -> str:
    full = report.variants[0].macs or 1
    shares = [f"{variant.name} {variant.macs / full:.1%}" for variant in report.variants]
    text = f"schedule {report.schedule.made_by or 'without a name'}: {', '.join(shares)} of the MACs"
    share = mac_share(report)
    if share is None:
        return f"{text}; the drift decides which one a step runs"
    return f"{text}; {share:.1%} on average, {1 / share:.2f} times fewer" if share else text


def mac_share(report: Report) -> float | None:
    """Share of the MACs that the schedule runs: on the long run if its rows repeat, else over all of them. None: the
    schedule is adaptive, so that the samples decide."""
    schedule: Schedule = report.schedule
    if schedule.adaptive is not None:
        return None
    macs = dict(zip(schedule.distinct_rows(), (variant.macs for variant in report.variants), strict=True))
    rows = schedule.rows[-schedule.period :] if schedule.period else schedule.rows
    full = macs[schedule.rows[0]] * len(rows)
    return sum(macs[row] for row in rows) / full if full else None
