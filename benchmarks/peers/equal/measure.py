"""Every contender on the held-out digits: drawn once, kept in files, paired with our schedules digit by digit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import fitted
from benchmarks.fitted import CONVERGED, FIRST_SEED, UNCACHED
from benchmarks.paired import interval, paired, psnr, worst
from benchmarks.peers.equal import roster
from benchmarks.peers.equal.lab import Contender, Lab, Size, batch_of
from benchmarks.peers.equal.ours import SHARES
from benchmarks.protocol import machine, when

BEST = {UNCACHED: "output, fitted to uncached", CONVERGED: "output, fitted to converged"}  # of ours, by truth
REGIONS, POLYNOMIAL = "regions, polynomial", "output, polynomial"
OURS = (*BEST.values(), REGIONS, POLYNOMIAL)

Line = Mapping[str, Any]  # the figures of one contender at one number of evaluations
Chosen = Mapping[str, Sequence[Any]]  # as `settings_of` gives it
Drawn = dict[str, Any]  # images of a seed, with the setting, how many were tried, evaluations and share of the MACs


class Bench:
    """Samples of ours and of the peers."""

    def __init__(self, size: Size, work: Path, ours: fitted.Bench, chosen: Chosen = MappingProxyType({})) -> None:
        """`chosen`: settings that are known."""
        self.size, self.work, self.fitted, self.chosen = size, work, ours, chosen
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def lab(self) -> Lab:
        steps = {}
        for count in self.size.counts:
            rows = self.fitted.schedule(int(SHARES[count]), UNCACHED).rows
            steps[count] = [step for step, row in enumerate(rows) if row[0] is fitted.Action.COMPUTE]
        return Lab(self.size, steps, self.work, self.fitted.task)

    def draw(self, contender: Contender, count: int) -> None:
        """All seeds that aren't in files yet."""
        missing = [seed for seed in self._seeds() if not self._file(contender, count, seed).exists()]
        if not missing:
            return
        setting, tried = self.lab.choose(contender, count, self.chosen.get(key_of(contender.name, count), ("", 0)))
        for seed in missing:
            images = setting.draw(batch_of(self.fitted.task, seed, self.size.batch))
            evaluations, macs = setting.spent()
            facts = {"setting": setting.label, "tried": tried, "evaluations": evaluations, "macs": macs}
            torch.save({"images": images, **facts}, self._file(contender, count, seed))

    def drawn(self, contender: Contender, count: int) -> list[Drawn]:
        """What is in files, from the first seed on."""
        drawn = []
        for seed in range(FIRST_SEED, FIRST_SEED + self.fitted.size.held_out):
            file = self._file(contender, count, seed)
            if not file.exists():
                break
            drawn.append(torch.load(file))
        return drawn

    @cached_property
    def truths(self) -> dict[str, Tensor]:
        return {UNCACHED: self.fitted.samples(UNCACHED), CONVERGED: self.fitted.samples(CONVERGED, order="second")}

    def ours(self, name: str, count: int) -> Tensor:
        """Samples of one of our schedules."""
        slug = name.replace(", ", "_").replace(" ", "_")
        truth = CONVERGED if name == BEST[CONVERGED] else UNCACHED
        family = fitted.REGIONS if name == REGIONS else truth
        schedule = self.fitted.schedule(int(SHARES[count]), family)
        if name == POLYNOMIAL:
            schedule = fitted.replace(schedule, output=None)
        return self.fitted.samples(f"{slug}_{SHARES[count]}", schedule)

    def marks(self, count: int) -> dict[str, str]:
        """By truth, of our schedules."""
        return {truth: fitted.mark_of(self.fitted.schedule(int(SHARES[count]), truth)) for truth in BEST}

    def has_regions(self, count: int) -> bool:
        """Whether a schedule of regions is committed, or was calibrated by an earlier run."""
        return self.fitted.known(int(SHARES[count]), fitted.REGIONS) is not None

    def _seeds(self) -> range:
        return range(FIRST_SEED, FIRST_SEED + self.size.held_out)

    def _file(self, contender: Contender, count: int, seed: int) -> Path:
        return self.work / f"{re.sub(r'[^a-z0-9]+', '_', contender.name.lower())}_{count}_{seed}.pt"


def measure(
    bench: Bench, chosen: Sequence[Contender], known: Mapping[str, Any], console: Console
) -> Iterator[dict[str, Any]]:
    """Draws what is missing of the chosen contenders; after each number of evaluations all figures.

    Args:
        bench: where samples are drawn and kept.
        chosen: whose figures are new.
        known: an earlier result, whose figures of other peers stay, with their leads over our schedules of then; or
            nothing.
        console: where each line is told.
    """
    levels = psnr(bench.truths[UNCACHED], bench.truths[CONVERGED])
    known = {**known, "uncached_to_converged_db": [round(figure, 3) for figure in interval(levels)]}
    ours = [{**one, "when": when(machine())} for one in _ours(bench)]
    known = {**known, "lines": merged(known.get("lines", ()), ours)}
    yield dict(known)
    for contender in chosen:
        for count in bench.size.counts:
            bench.draw(contender, count)
            line = _line(bench, contender, count)
            console.print(line, highlight=False)
            known = {**known, "lines": merged(known["lines"], [{**line, "when": when(machine())}])}
            yield dict(known)


def settings_of(result: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings of a result, by name and number of evaluations: each a label, and among how many it was the best."""
    return {key_of(line["name"], line["count"]): [line["setting"], line["tried"]] for line in result["lines"]}


def key_of(name: str, count: int) -> str:
    """Of a contender at a number of evaluations, in `settings`."""
    return f"{name}, {count}"


def merged(known: Sequence[Line], new: Sequence[Line]) -> list[Line]:
    """All lines, the new ones in place of those of the same name and count: ours by count, then others by name."""
    names = [*(f"moeca {name}" for name in OURS), *(contender.name for contender in roster.contenders())]
    lines = {(line["name"], line["count"]): line for line in (*known, *new)}

    def place(key: tuple[str, int]) -> tuple[int, int, int]:
        own = names.index(key[0])
        return (0, -key[1], own) if own < len(OURS) else (1, own, -key[1])

    return [lines[key] for key in sorted(lines, key=place)]


def _ours(bench: Bench) -> list[dict[str, Any]]:
    """The lines of our schedules. Those of regions only where a schedule is there: peers aren't compared with them."""
    return [
        _own_line(bench, name, count)
        for count in bench.size.counts
        for name in OURS
        if name != REGIONS or bench.has_regions(count)
    ]


def _own_line(bench: Bench, name: str, count: int) -> dict[str, Any]:
    facts = {"setting": f"calibrated for {SHARES[count]} %", "tried": 1, "evaluations": count, "macs": count / 50}
    return _with_qualities(bench, bench.ours(name, count), count, {"name": f"moeca {name}", "kind": "moeca", **facts})


def _line(bench: Bench, contender: Contender, count: int) -> dict[str, Any]:
    drawn = bench.drawn(contender, count)
    mean = {name: sum(seed[name] for seed in drawn) / len(drawn) for name in ("evaluations", "macs")}
    facts = {
        "setting": drawn[0]["setting"],
        "tried": drawn[0]["tried"],
        **{name: round(mean[name], 3) for name in mean},
    }
    head = {"name": contender.name, "kind": contender.kind, "target": contender.target, "note": contender.note}
    return _with_qualities(bench, torch.cat([seed["images"] for seed in drawn]), count, {**head, **facts})


def _with_qualities(bench: Bench, images: Tensor, count: int, head: dict[str, Any]) -> dict[str, Any]:
    """`lead_db`: of our schedule that is fitted to that truth over this one, digit by digit; `ours`: which ones."""
    qualities = {truth: psnr(images, samples[: len(images)]) for truth, samples in bench.truths.items()}
    ours = {
        truth: psnr(bench.ours(BEST[truth], count)[: len(images)], bench.truths[truth][: len(images)]) for truth in BEST
    }
    return {
        **head,
        "count": count,
        "digits": len(images),
        "ours": bench.marks(count),
        "psnr_db": {truth: [round(figure, 3) for figure in interval(levels)] for truth, levels in qualities.items()},
        "worst_5_percent_db": {truth: round(worst(levels), 3) for truth, levels in qualities.items()},
        "lead_db": {
            truth: [round(figure, 3) for figure in paired(ours[truth], levels)] for truth, levels in qualities.items()
        },
    }
