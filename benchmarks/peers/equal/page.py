"""docs/peers.md, from the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fitted import CONVERGED, UNCACHED
from benchmarks.pages import markdown
from benchmarks.peers.equal import roster
from benchmarks.peers.equal.measure import BEST
from benchmarks.protocol import when
from benchmarks.tasks import DIGITS, Task

PAGE = Path("docs/peers.md")
MODELS = {
    "digits": "the digits model, a toy of 2.9 M parameters and 16 x 16 pixels in 64 tokens",
    "glyphs": "the glyphs model, a toy of 4.4 M parameters, 62 classes and 32 x 32 pixels in 64 tokens",
}
TRUTHS = (UNCACHED, CONVERGED)
EARLIER = "†"
NO_LIMIT = ("at most -1 cached in a row", "no limit on cached steps in a row")  # in a result, and on the page
HEAD = (
    "", "tried", "evaluations", "MACs", "to uncached, dB", "worst 5 %", "moeca's lead", "to converged, dB", "worst 5 %",
    "moeca's lead", "samples", "setting",
)  # fmt: skip

Line = Mapping[str, Any]


def page_of(task: Task) -> Path:
    """Where a task's page is."""
    return PAGE if task is DIGITS else PAGE.with_stem(f"{PAGE.stem}-{task.name}")


def load(folder: Path, task: Task = DIGITS) -> dict[str, Any]:
    """What was measured: qualities, and latencies where there are any."""
    files = {name: folder / f"{task.results_of(f'peers_{name}')}.json" for name in ("equal", "latency", "equal_time")}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def write(folder: Path, task: Task = DIGITS) -> None:
    """The whole page."""
    page_of(task).write_text(text(load(folder, task), task))


def text(results: Mapping[str, Any], task: Task = DIGITS) -> str:
    """What the page says; `results` as `load` gives them."""
    result = results["equal"]
    timed = latency(results["latency"], task) if "latency" in results else ""
    timed += equal_time(results["equal_time"], task) if "equal_time" in results else ""
    lines = marked(result["lines"])
    counts = sorted({line["count"] for line in lines}, reverse=True)
    level, half = result["uncached_to_converged_db"]
    tables = "\n\n".join(f"## {count} of 50 evaluations\n\n{table(lines, count, task.name)}" for count in counts)
    what, option = task.name, "" if task is DIGITS else f" --task {task.name}"
    file = f"benchmarks/results/{task.results_of('peers_equal')}.json"
    return f"""<!-- Written by `python -m benchmarks.peers.equal{option} --report` from {file}. -->
# Peers at equal evaluations{"" if task is DIGITS else f": {what}"}

Every peer at its best, at as many full evaluations of the network as moeca's schedules make: quality to two truths, on
held-out {what}, paired one by one. `python -m benchmarks.peers.equal{option}`, {when(result["machine"])};
[every figure](../{file}). Quality doesn't depend on the machine's load.

- The model is {MODELS[what]}. All replace a run of 50 Euler steps. The
  converged truth is a second-order run of 200 steps; the uncached run comes {level:.1f} ± {half:.1f} dB near.
- The best of a family's settings, or of its steps and weights, is chosen on seeds 0 to 15, two {what} each; caches on
  the first 8 of these (TaylorSeer on all). *Tried* is the number of settings that were sampled there. What is told are
  other {what}, the same as in [fitted output weights](fitted.md); of caches fewer, by the column *{what}*.
- *Evaluations* are full ones, a mean over the {what}; a setting that computes less was the best that fits. *MACs* are
  the share of the uncached run's: caches inside the network run its first block, or its ends, at cheap steps too.
- *moeca's lead* is over that row: the schedule fitted to that truth less the row, mean and 95 % interval of the
  differences one by one.
- moeca's schedules were chosen by `moeca.calibrate`; one schedule for each truth, two rows. No best of several families
  is told.{earlier(lines)}{later(lines, when(result["machine"]))}

## Is moeca ahead?

The lead at each number of evaluations, in dB. Bold: the interval isn't above zero.

To the uncached run, of *{BEST[UNCACHED]}*:

{leads(lines, UNCACHED, counts)}

To the converged solution, of *{BEST[CONVERGED]}*:

{leads(lines, CONVERGED, counts)}

{verdict(lines)}

{tables}
{timed}
## How settings are chosen

{notes(lines)}
{missing(lines, task)}"""


def marked(lines: Sequence[Line]) -> list[Line]:
    """The lines; `earlier`: the lead is over other schedules than those that the result has."""
    now = {line["count"]: line.get("ours") for line in lines if line["name"] == f"moeca {BEST[UNCACHED]}"}
    return [{**line, "earlier": line.get("ours") != now.get(line["count"])} for line in lines]


def earlier(lines: Sequence[Line]) -> str:
    """What a mark at a lead means; nothing where there is none."""
    if not any(line.get("earlier") for line in lines):
        return ""
    return f"\n- {EARLIER} at a lead: it is of moeca's schedules at the time of that line's run; they are others now."


def leads(lines: Sequence[Line], truth: str, counts: Sequence[int]) -> str:
    """One row a contender."""
    rows = []
    for name in dict.fromkeys(line["name"] for line in lines):
        cells = {line["count"]: _lead(line, truth) for line in lines if line["name"] == name}
        if name != f"moeca {BEST[truth]}":
            rows.append([name, *(cells.get(count, "-") for count in counts)])
    return markdown(["", *(f"{count} of 50" for count in counts)], rows)


def verdict(lines: Sequence[Line]) -> str:
    """Where no lead is shown, by truth."""
    sentences = []
    for truth in TRUTHS:
        peers = [line for line in lines if line["kind"] != "moeca"]
        behind = [line for line in peers if not _is_ahead(line["lead_db"][truth])]
        names = ", ".join(
            f"{line['name']} at {line['count']} ({_signed(line['lead_db'][truth])} dB)" for line in behind
        )
        sentences.append(
            f"- to {truth}: ahead with an interval above zero in {len(peers) - len(behind)} of {len(peers)} comparisons"
            + (f"; not of {names}." if behind else ".")
        )
    return "\n".join(sentences)


def table(lines: Sequence[Line], count: int, what: str) -> str:
    """All contenders at one number of evaluations; `what` is sampled."""
    rows = []
    for line in lines:
        if line["count"] != count:
            continue
        cells = [line["name"], str(line["tried"]), f"{line['evaluations']:.1f}", f"{line['macs']:.1%}"]
        for truth in TRUTHS:
            mean, half = line["psnr_db"][truth]
            is_itself = line["name"] == f"moeca {BEST[truth]}"
            lead = "" if is_itself else _told(line, truth)
            cells += [f"{mean:.1f} ± {half:.1f}", f"{line['worst_5_percent_db'][truth]:.1f}", lead]
        rows.append([*cells, str(line["digits"]), line["setting"].replace(*NO_LIMIT)])
    return markdown([*HEAD[:-2], what, HEAD[-1]], rows)


def latency(result: Mapping[str, Any], task: Task = DIGITS) -> str:
    """A section on the time of some of them."""
    rows = [
        [
            point["family"],
            f"{point['speedup']:.2f} ({min(point['speedup_by_round']):.2f} to {max(point['speedup_by_round']):.2f})",
            f"{point['speedup_of_processor_time']:.2f}",
            f"{point['macs']:.1%}",
            f"{1 / point['macs']:.2f}",
        ]
        for point in result["points"]
    ]
    head = ("", "speedup (by round)", "of processor time", "MACs", "limit by MACs")
    command = "python -m benchmarks.peers.equal.latency" + ("" if task is DIGITS else f" --task {task.name}")
    size, load = result["size"], result["load_1min"]
    rounds = f"{size['rounds']} rounds of {size['digits']} {task.name}"
    return f"""
## Time at 17 of 50 evaluations

`{command}`, {when(result["machine"])}: one thread, in turns with `torch.compile` of the
prepared model, {rounds}, at load {min(load):.1f} to {max(load):.1f}. Others'
load is in the wall's time and hardly in that of the processor. All compute 17 of 50 steps in full, MagCache 17 at most.

{markdown(head, rows)}

At a cheap step calibrated multistep calls nothing, and moeca's compiled model computes a weighted sum, called from
Python: {_cheap_steps(result, task)}
"""


def _cheap_steps(result: Mapping[str, Any], task: Task) -> str:
    """What a cheap step takes, by the number of samples."""
    told = [f"{one['share']:.2%} of a full step with {one['samples']} {task.name}" for one in result["cheap_steps"]]
    return f"{', '.join(told)} at once (each with\nguidance, so twice as many rows)."


def equal_time(result: Mapping[str, Any], task: Task = DIGITS) -> str:
    """A section on the nearest peer at equal time."""
    rows = [
        [
            str(line["count"]),
            line["truth"],
            f"{line['steps_in_our_time']:.1f}",
            str(line["evaluations"]),
            f"{line['psnr_db'][0]:.1f} ± {line['psnr_db'][1]:.1f}",
            _marked(line["lead_db"], _signed(line["lead_db"])),
        ]
        for line in result["lines"]
    ]
    head = ("moeca's full steps", "truth", "its steps in that time", "drawn with", "dB", "moeca's lead, dB")
    command = "python -m benchmarks.peers.equal.equal_time" + ("" if task is DIGITS else f" --task {task.name}")
    return f"""
## The nearest peer at equal time

Calibrated multistep, with the steps that it computes while moeca's schedule of the output runs: by the times above,
rounded to whole steps. `{command}`,
{when(result["machine"])}, {result["samples"]} {task.name}. The other rows above take more time for as many
evaluations, but for the samplers, which take as much as this one and are farther behind.

{markdown(head, rows)}
"""


def missing(lines: Sequence[Line], task: Task = DIGITS) -> str:
    """Contenders that have no figures yet."""
    measured = {line["name"] for line in lines}
    names = [contender.name for contender in roster.contenders(task) if contender.name not in measured]
    return f"\nWritten, without figures yet: {', '.join(names)}.\n" if names else ""


def later(lines: Sequence[Line], first: str) -> str:
    """Which lines are of another run than the page names; of a contender that several runs measured, the counts too."""
    counts: dict[tuple[str, str], list[int]] = {}  # by run and contender
    for line in lines:
        counts.setdefault((line.get("when", first), line["name"]), []).append(line["count"])
    times_named = Counter(name for _, name in counts)
    runs: dict[str, list[str]] = {}
    for (run, name), at in counts.items():
        if run != first:
            which = f"{run}, at {', '.join(map(str, at))}" if times_named[name] > 1 else run
            runs.setdefault(which, []).append(name)
    return "".join(f"\n- Of another run, {which}: {'; '.join(names)}." for which, names in runs.items())


def notes(lines: Sequence[Line]) -> str:
    """What is tried of each family."""
    by_name = {line["name"]: f"{line['note']}; chosen by PSNR to {line['target']}" for line in lines if "note" in line}
    return "\n".join(f"- {name}: {note}." for name, note in by_name.items())


def _is_ahead(lead: Sequence[float]) -> bool:
    mean, half = lead
    return bool(mean - half > 0)


def _marked(lead: Sequence[float], told: str) -> str:
    """Bold: the interval isn't above zero."""
    return told if _is_ahead(lead) else f"**{told}**"


def _lead(line: Line, truth: str) -> str:
    return _marked(line["lead_db"][truth], _told(line, truth))


def _told(line: Line, truth: str) -> str:
    return _signed(line["lead_db"][truth]) + (EARLIER if line.get("earlier") else "")


def _signed(lead: Sequence[float]) -> str:
    mean, half = lead
    return f"{mean:+.1f} ± {half:.1f}"
