"""The pages that the results give: docs/benchmarks.md, docs/peers.svg and a table in the README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import speed, tables
from benchmarks.peers.picture import draw
from benchmarks.peers.verdict import judge, points_of
from benchmarks.peers.workloads import WORKLOADS
from benchmarks.protocol import when

PAGE, PICTURE, README = Path("docs/benchmarks.md"), Path("docs/peers.svg"), Path("README.md")
BEGIN, END = "<!-- peers: written by python -m benchmarks.peers --report -->", "<!-- peers: end -->"

Payload = Mapping[str, Any]


def load(folder: Path) -> dict[str, Payload]:
    """What was measured, by workload; the digits are, whatever else is."""
    files = {name: folder / f"{work.result}.json" for name, work in WORKLOADS.items()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if name == "digits" or file.exists()}


def write(payloads: Mapping[str, Payload], root: Path = Path()) -> list[Path]:
    """All three, below `root`; what `load` gives."""
    payload = payloads["digits"]
    (root / PAGE).write_text(pages(payloads))
    draw(points_of(payload), root / PICTURE)
    readme = (root / README).read_text()
    (root / README).write_text(with_block(readme, block(payload)))
    return [root / PAGE, root / PICTURE, root / README]


def with_block(text: str, new: str) -> str:
    """The text with what lies between the markers replaced.

    Raises:
        ValueError: the text has no markers.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{README} needs the lines {BEGIN!r} and {END!r}, between which the table goes")
    return pattern.sub(lambda _: f"{BEGIN}\n{new}\n{END}", text)


def block(payload: Payload) -> str:
    """The README's table: contenders at equal latency, by both truths."""
    return tables.both_truths(points_of(payload))


def verdict(payload: Payload) -> str:
    return "\n".join(
        f"- {target.name}: **{'met' if target.met else 'missed'}** ({target.measured})"
        for target in judge(points_of(payload))
    )


def summary(payload: Payload) -> str:
    """What a run prints: contenders at equal latency and the verdict where all was measured, else each setting."""
    try:
        return f"{tables.equal_latency(points_of(payload))}\n\n{verdict(payload)}"
    except (KeyError, StopIteration, ValueError):
        return tables.settings(points_of(payload), None)


def pages(payloads: Mapping[str, Payload]) -> str:
    """docs/benchmarks.md."""
    return page(payloads["digits"]) + speed.sections(payloads)


def page(payload: Payload) -> str:
    """What docs/benchmarks.md says of the digits."""
    points, heats = points_of(payload), payload["heats"]
    return f"""{_intro(payload)}
## At equal measured latency

PSNR in dB to the uncached digits at a speedup. A contender's level there is that of its upper hull: its settings, and
mixtures of two neighbours in time. A dash: no setting is as fast.

{tables.equal_latency(points)}

At equal measured latency at least 2 dB above the best peer at every speedup from 1.5x to 5x, each family of moeca by
itself; to the uncached digits, where no other truth is named:

{verdict(payload)}

The digits are few for an interval. [At equal evaluations](peers.md) peers are at their best, on up to 256 digits, with
paired intervals.

The mean of the worst 5 % of the digits, to the uncached ones:

{tables.equal_latency(points, figure="psnr_db_worst")}

The means against the converged solution, from which the uncached digits themselves are
{tables.uncached_from_converged(points)} dB:

{tables.equal_latency(points, "converged")}

![PSNR to both truths against speedup, each contender](peers.svg)

## Where the margins come from

{_listed(tables.causes(points))}

## Compile and cache apart

Speedups over `torch.compile` of the prepared model, each measured beside it. "Prepared, nothing cached, compiled" is a
second instance of the baseline itself: what it differs from 1 is what a speedup here can be off. Hooks and checks of
diffusers and cache-dit can't be traced; what is compiled is each hooked module (diffusers), each block (cache-dit), or
the model as a whole with graph breaks. FORA's and TeaCache's rules, which are written anew here, are whole graphs.

{tables.compile_and_cache(points)}

## Compiling, and memory

Graphs and graph breaks are Dynamo's, in the first trajectories of a contender's settings. Seconds are those of the
first setting, with Inductor's caches on disk empty; a dash where they weren't. The state is what a contender keeps
between steps, at its first setting; the peak is how far the process's resident memory rose in one trajectory that
began without state (onnxruntime keeps its arena from run to run, so that its peak isn't seen).

{tables.families(heats)}

## Never a hit

Each cache switched on at a setting that never hits: what its machinery costs where it can't help.

{tables.never_a_hit(points)}

## Every setting

{tables.settings(points, tables.shipped_of(points))}

## How each contender is set

{_listed(tables.notes(heats))}

Long skips: Skip-Cache needs a model trained with them. `python -m benchmarks.skip` holds it against the same span
cached by moeca on such a model ([figures](../benchmarks/results/skip.json)).
"""


def _intro(payload: Payload) -> str:
    size, machine = payload["size"], payload["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    loads = [load for heat in payload["heats"].values() for load in heat["load_1min"]]
    count = size["rounds"] * size["digits"]
    return f"""<!-- Written by `python -m benchmarks.peers --report` from benchmarks/results/peers.json. -->
# moeca beside its peers

`python -m benchmarks.peers` ([every figure](../benchmarks/results/peers.json)): {payload["model"]};
{size["steps"]} Euler steps, {size["rounds"]} batches of {size["digits"]} digits, none of them used to calibrate or fit.

- {machine["torch_threads"]} thread. Contenders run in heats ({len(payload["heats"])} here), each in one process.
  Its settings take turns, a batch a round, with the baseline, `torch.compile` of the prepared model, before, after and
  between them. A speedup is the median over the
  rounds of the baseline's mean time on both sides of a run over that run's time, decisions and solver included.
- Once compiled, all are timed without Dynamo's guards (`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`;
  moeca in frozen trajectories) but those whose graphs nothing else tells apart: models compiled as a whole, with
  breaks. Their first images, made with guards, have to be the same.
- The digits whose drawing is timed are those whose quality is told: {count}, which is few for the Fréchet distance (to
  the uncached digits, in our classifier's features).
- The converged solution has {size["converged"]} second-order steps.
- MACs are counted: calls of each module times what torch's counter gives for it on the model as shipped; for moeca
  node by node. The two counts agree.
{_listed(payload.get("remarks", ()))}
- {machine["processor"]}, {machine["cores"]} cores that others used too (load {min(loads):.1f} to {max(loads):.1f}),
  Python {machine["python"]}, {packages}; {when(machine)}.
"""


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
