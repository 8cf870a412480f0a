"""`calibrate`: a budget in, a schedule out, found on the user's own model, sampler and machine.

Three stages: sample a few seeds uncached (the truth), measure what a forecast of each step from each pair of earlier
steps would cost in quality, then search, with every plan of note sampled for real.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from moeca_compile.backend import Bank, Entry, visiting
from moeca_compile.errors import ScheduleError
from moeca_compile.face import compile as moeca_compile_model
from moeca_compile.face import inner_module
from moeca_compile.plan.budget import Budget
from moeca_compile.plan.cost import Costs, row_of, schedule_of
from moeca_compile.plan.search import Search, psnr
from moeca_compile.program import Program
from moeca_compile.runtime.dispatch import Track, Tracks, arguments_for, run_step
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.trajectory import Trajectory
from moeca_compile.schedule import Schedule

Sampler = Callable[[Any, int], torch.Tensor]
MAX_GAP = 8


def calibrate(
    model: torch.nn.Module,
    sample: Sampler,
    *,
    budget: str,
    order: int = 1,
    max_variants: int = 4,
    seeds: Sequence[int] = (0, 1),
    holdout: Sequence[int] = (1000, 1001),
    rollouts: int = 60,
    data_range: float | None = None,
    inner: str = "inductor",
    progress: bool = True,
) -> Schedule:
    """Find the best schedule that a budget allows.

    Args:
        model: as `moeca_compile.compile` takes it; its weights are only read.
        sample: the user's own loop: `sample(model, seed)` returns the final samples, deterministic in `seed`.
        budget: `macs:0.26` (fraction of the uncached multiply-accumulates), `latency:0.4` (of the uncached time of
            the variants, measured here), `state:64MiB`, `psnr:45` (the cheapest that holds it), or several with commas.
        order: of the forecasts, 0 to 2.
        max_variants: distinct rows allowed; 2: all or nothing, 3 and more: attention-only rows too.
        seeds, holdout: what the search sees, and what only the final check sees; no seed in both.
        rollouts: how many plans are sampled at most (each once a seed).
        data_range: of the samples, for the PSNR; None: what the uncached samples span.
        inner: `inductor` or `eager`, as in `Options`.
        progress: show a progress bar where `rich` is installed.

    Returns:
        A closed schedule, one row a step, with the timesteps it was made for. `predicted` holds `mac_fraction`,
        `state_bytes`, `psnr_db` on the search's seeds and `psnr_db_holdout` on the others.

    Raises:
        ScheduleError: a budget that can't be read or kept, seeds in both sets, a sampler that isn't deterministic.
    """
    limits = Budget.parse(budget)
    if not seeds or set(seeds) & set(holdout):
        raise ScheduleError("calibrate: seeds must not be empty, and no seed may be in both seeds and holdout")
    study = Study(model, sample, order, inner)
    truth = {seed: study.run(seed) for seed in (*seeds, *holdout)}
    _check(study, truth)
    spread = data_range or float(max(t.max() for t in truth.values()) - min(t.min() for t in truth.values()))
    with _bar(progress, rollouts) as tick:
        errors = study.teacher_forced(seeds[0])
        search = Search(
            steps=study.steps,
            costs=study.costs(limits.latency is not None),
            errors=errors,
            rollout=lambda plan: study.error(plan, {seed: truth[seed] for seed in seeds}),
            rollouts=rollouts,
            with_attention=max_variants >= 3 and "attention" in study.kinds,
            max_gap=MAX_GAP,
            progress=lambda plan, error: tick(
                f"{search.costs.fraction(plan):.1%} of the MACs: {psnr(error, spread):.1f} dB"
            ),
        )
        plan = _cheapest(search, limits, spread) if limits.psnr_db is not None else search.best(limits)
    predicted = {
        "mac_fraction": search.costs.fraction(plan),
        "state_bytes": float(search.costs.state_bytes if "F" in plan or "A" in plan else 0),
        "psnr_db": psnr(search.seen[plan], spread),
        "rollouts": float(len(search.seen)),
    }
    if holdout:
        held_out = study.error(plan, {seed: truth[seed] for seed in holdout})
        predicted["psnr_db_holdout"] = psnr(held_out, spread)
    made_by = f"calibrated for {budget}, order {order}"
    found = schedule_of(plan, study.program.regions.keys, study.kinds, order, made_by)
    timesteps = study.timesteps if len(study.timesteps) == study.steps else ()
    return replace(found, fingerprint=study.program.regions.fingerprint, timesteps=timesteps, predicted=predicted)


def _check(study: Study, truth: dict[int, torch.Tensor]) -> None:
    """Refuse a sampler whose samples say nothing about a schedule."""
    study.require_program()
    first, *others = truth
    if not all(bool(samples.isfinite().all()) for samples in truth.values()):
        raise ScheduleError("calibrate: the uncached samples aren't all finite; mend the model or the sampler first")
    if not torch.equal(study.run(first), truth[first]):
        raise ScheduleError("calibrate: sample(model, seed) gave two results for one seed; it must depend on it alone")
    if others and all(torch.equal(truth[first], truth[other]) for other in others):
        raise ScheduleError("calibrate: the samples of all seeds are alike; sample(model, seed) must use its seed")


def _cheapest(search: Search, limits: Budget, spread: float) -> str:
    """The cheapest plan that holds a PSNR: tighten the budget until none does."""
    assert limits.psnr_db is not None
    wanted = limits.psnr_db
    whole = search.rollouts
    for fraction in (0.6, 0.5, 0.42, 0.34, 0.26, 0.2, 0.16, 0.12):
        search.rollouts = min(whole, len(search.seen) + max(6, whole // 6))
        allowed = replace(limits, macs=min(fraction, limits.macs or 1.0), psnr_db=None)
        try:
            held = psnr(search.seen[search.best(allowed)], spread) >= wanted
        except ScheduleError:  # nothing is that cheap
            break
        if not held:
            break
    holds = [plan for plan, error in search.seen.items() if psnr(error, spread) >= wanted]
    return min(holds, key=search.costs.fraction, default="C" * search.steps)


class Study:
    """A model with its sampler, run with any plan; each run is a trajectory of its own."""

    def __init__(self, model: torch.nn.Module, sample: Sampler, order: int, inner: str) -> None:
        self.sample, self.order = sample, order
        self.caching = Schedule.uniform(2, order=order)  # whose state is kept, whatever plan runs
        self.handle = moeca_compile_model(inner_module(model), schedule=self.caching, inner=inner)
        self._programs: list[Program] = []
        self.steps = 0
        self.timesteps: tuple[float, ...] = ()

    def require_program(self) -> None:
        """Raise unless the sampler called the model."""
        if not self._programs:
            raise ScheduleError("calibrate: sample(model, seed) never called the model")

    @property
    def program(self) -> Program:
        """The graph with the most regions; all of them run the plan."""
        self.require_program()
        return max(self._programs, key=lambda program: len(program.regions))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(region.kind for region in self.program.regions)

    def run(
        self, seed: int, plan: str = "", watch: Callable[[Program, Track, Sequence[Any], Any], None] | None = None
    ) -> torch.Tensor:
        """The samples of one seed with a plan; '' computes everything, and counts the steps."""
        tracks = Tracks(Trajectory(()))
        bound: set[Program] = set()

        def visit(entry: Entry, args: Sequence[Any], bank: Bank) -> tuple[Any, ...]:
            program = entry.program(args, bank)
            if program not in bound:
                bound.add(program)
                if program not in self._programs:
                    self._programs.append(program)
                kinds = [region.kind for region in program.regions]
                schedule = schedule_of(plan, program.regions.keys, kinds, self.order) if plan else Schedule.full()
                program.use(schedule, keep=self.caching)
            results = run_step(program, tracks, args, None)
            if watch is not None:
                watch(program, tracks.of(program), args, results)
            return results

        try:
            with visiting(visit), torch.no_grad():
                samples = self.sample(self.handle, seed).detach().float().cpu()
        finally:
            for program in bound:  # whoever compiles the model with equal options shares them
                program.use(self.caching)
        if not plan and tracks.by_program:
            self.steps = 1 + max(record.step for record in tracks.of(self.program).records)
        return samples

    def error(self, plan: str, truth: dict[int, torch.Tensor]) -> float:
        """Mean squared error of a plan's samples against the uncached ones."""
        return statistics.fmean(float(((self.run(seed, plan) - true) ** 2).mean()) for seed, true in truth.items())

    def costs(self, with_latency: bool) -> Costs:
        """MACs of each row kind; milliseconds too, the medians of interleaved runs, where the budget needs them."""
        program = self.program
        rows = {letter: row_of(letter, self.kinds, self.order) for letter in "CAF"}
        macs = {letter: float(program.variant(row).macs) for letter, row in rows.items()}
        ms = self._milliseconds() if with_latency else {}
        return Costs(macs, ms, sum(slot.bytes for slot in program.layout))

    def _milliseconds(self, rounds: int = 7) -> dict[str, float]:
        taken: dict[str, list[float]] = {letter: [] for letter in "CAF"}

        def watch(program: Program, track: Track, args: Sequence[Any], results: Any) -> None:
            state = next(iter(track.states.values()))
            if program is not self.program or state.last_step < 2 or len(taken["C"]) >= rounds:
                return
            for letter in "CAF":
                variant = program.variant(row_of(letter, self.kinds, self.order))
                arguments = arguments_for(program, track, variant, args, state, state.last_step + 1)
                run = program.compile(variant, arguments)
                begin = time.perf_counter()
                run(arguments)
                taken[letter].append((time.perf_counter() - begin) * 1e3)

        self.run(0, watch=watch)
        return {letter: statistics.median(times) for letter, times in taken.items()}

    def teacher_forced(self, seed: int) -> dict[tuple[int, int, int], float]:
        """Errors of the output at s when forecast from the true region outputs at a and p, for all gaps up to MAX_GAP.

        Weighted by how far the latent then moves for an output of that size, so that errors of different steps compare.
        Holds the region outputs of 2 MAX_GAP steps.
        """
        found: dict[tuple[int, int, int], float] = {}
        outputs: dict[Any, dict[int, list[torch.Tensor]]] = {}
        moved: dict[int, float] = {}
        times: dict[int, float] = {}
        last: list[torch.Tensor] = []
        size = 0.0

        def watch(program: Program, track: Track, args: Sequence[Any], results: Any) -> None:
            nonlocal size
            if program is not self.program:
                return
            record = track.records[-1]
            step = record.step
            state = next(s for name, s in track.states.items() if str(name) == record.stream)
            if program.timestep is not None:
                times[step] = float(torch.as_tensor(args[program.timestep]).reshape(-1)[0])
            latent = args[program.latent] if program.latent is not None else None
            if latent is not None:
                if last and step not in moved:
                    moved[step] = float((latent - last[0]).norm()) / max(size, 1e-12)
                last[:] = [latent.clone()]
            size = float(results[0].norm())
            y_slots = [i for i, slot in enumerate(program.layout) if slot.slot == "y0"]
            kept = outputs.setdefault(record.stream, {})
            for (p, a), forged in self._pasts(program, kept, y_slots, step):
                variant = program.variant(row_of("F", self.kinds, self.order))
                arguments = arguments_for(program, track, variant, args, forged, step)
                guess = program.compile(variant, arguments)(arguments)[0]
                off = float((guess - results[0]).norm())
                found[p, a, step] = found.get((p, a, step), 0.0) + off
            kept[step] = [state.tensors[i] for i in y_slots]
            kept.pop(step - 2 * MAX_GAP, None)

        self.run(seed, watch=watch)
        self.timesteps = tuple(times[step] for step in sorted(times))
        typical = statistics.median(moved.values()) if moved else 1.0
        return {(p, a, s): e * moved.get(s + 1, typical) for (p, a, s), e in found.items()}

    def _pasts(
        self, program: Program, kept: dict[int, list[torch.Tensor]], y_slots: list[int], step: int
    ) -> Iterator[tuple[tuple[int, int], StreamState]]:
        """Every pair of computed steps that `step` could be forecast from, as the state they would have left."""
        regions = len(program.regions)
        for a in range(max(0, step - MAX_GAP + 1), step):
            for p in [*range(max(0, a - MAX_GAP), a), *([-1] if a == 0 else [])]:
                if a not in kept or (p >= 0 and p not in kept):
                    continue
                state = StreamState(program.layout, regions)
                state.history = [(a,) if p < 0 else (a, p)] * regions
                for number, slot in enumerate(y_slots):
                    state.tensors[slot] = kept[a][number]
                    if self.order and p >= 0:
                        state.tensors[slot + 1] = kept[p][number]
                yield (p, a), state


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    try:
        from rich.progress import Progress
    except ImportError:
        show = False
    if not show:
        yield lambda text: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("searching", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
