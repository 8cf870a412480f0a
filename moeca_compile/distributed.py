"""Data parallel sampling and calibration on the ranks of `torch.distributed`.

Each rank runs the whole model on its own seeds. A schedule says beforehand what each step computes, so ranks need not
agree on anything while they sample. What must be equal on all ranks (versions, weights, schedule) is compared first.

    torch.distributed.init_process_group("gloo")          # under torchrun
    images = sample(compiled, draw, range(64), "images")  # each rank draws its share; all get all of them
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from moeca_compile.errors import OptionError, StateError
from moeca_compile.frontend.backend import Backend
from moeca_compile.frontend.handles import backend_of
from moeca_compile.frontend.model_arguments import models_of, plain_module
from moeca_compile.frontend.owner import handle_of
from moeca_compile.planner.calibration import Studies, find_schedule, reported
from moeca_compile.planner.front import NOT_FOR_REQUESTS, bound_arguments
from moeca_compile.planner.request import Request
from moeca_compile.planner.rollout import Sampler
from moeca_compile.planner.study import Study
from moeca_compile.planner.truth import Goal, goal_of
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.output import CONVERGED

__all__ = ["calibrate", "check_ranks", "identity", "sample", "share"]

JOB = "job.json"


def share(seeds: Iterable[int]) -> list[int]:
    """The seeds of this rank: every n-th one of n ranks.

    Args:
        seeds: of all ranks, in the same order on each.

    Returns:
        This rank's seeds, in their order.

    Raises:
        StateError: `torch.distributed` isn't initialized.
    """
    _require_group()
    return list(seeds)[distributed.get_rank() :: distributed.get_world_size()]


def check_ranks(model: Any, **further: object) -> None:
    """Compare what must be equal on all ranks: versions, weights, and the schedule and options of compiled models.

    Every rank calls it, and every rank gets the same answer, before anything is sampled.

    Args:
        model: compiled or plain; a pipeline or a list of models.
        further: by name, other values that must be equal; compared by their text.

    Raises:
        StateError: ranks differ. The message names what, and the ranks. Or one of them ended, or
            `torch.distributed` isn't initialized.
    """
    _compared(model, further)


def sample(model: Any, draw: Sampler, seeds: Iterable[int], folder: str | Path) -> dict[int, Tensor]:
    """Sample the seeds, each on one rank.

    Each sample is written to `<folder>/<seed>.npy` when it is done. A job that broke off goes on from there: the same
    call draws what is missing. The samples are those of one process, bit for bit, on ranks of the same kind.

    Args:
        model: the first argument of `draw`; compiled or plain.
        draw: `draw(model, seed)` gives the samples of a seed, deterministic in it.
        seeds: of all ranks.
        folder: that all ranks see; made if it isn't there. It belongs to one job: these weights and this schedule.

    Returns:
        The samples by seed, in the order of `seeds`, on every rank.

    Raises:
        StateError: the ranks differ, one of them ended or failed, or the folder is another job's. What `draw` raises on
            this rank is raised as it is.
        OptionError: a seed is given twice.
    """
    every, folder = list(seeds), Path(folder)
    if len(set(every)) < len(every):
        raise OptionError("sample: a seed is given twice")
    _check_job(_compared(model, {"seeds": every}), folder)

    def draw_own() -> None:
        for seed in share(every):
            if not (folder / f"{seed}.npy").exists():
                with torch.no_grad():
                    _write(folder / f"{seed}.npy", draw(model, seed))

    _on_every_rank(draw_own, f"while samples were drawn. Those that are done are in {str(folder)!r}")
    missing = [seed for seed in every if not (folder / f"{seed}.npy").exists()]
    if missing:
        raise StateError(f"sample: {str(folder)!r} lacks seeds {missing}: give a folder that all ranks see")
    return {seed: torch.from_numpy(np.load(folder / f"{seed}.npy", allow_pickle=False)) for seed in every}


def calibrate(
    model: Any, draw: Sampler, *, budget: str, resume: str | Path | None = None, **arguments: Any
) -> Schedule:
    """Calibrate on several ranks: the uncached samples of the seeds are shared out, rank 0 searches.

    What rank 0 measures itself (the first seed, and those of the drift) isn't shared. So this pays with 8 seeds or
    more, held-out ones included. The schedule is that of one process, but for the figures of time.

    Args:
        model: as for `moeca_compile.calibrate`; the same on all ranks.
        draw: its `sample`.
        budget: likewise.
        resume: a folder that rank 0 reads and writes. An interrupted calibration goes on from there.
        **arguments: further arguments of `moeca_compile.calibrate`, except `prompts` and `call`. A `truth` of samples,
            a function or a model is read by rank 0; samples must be the same on all ranks. It can't be `converged`.

    Returns:
        The schedule, on every rank.

    Raises:
        StateError: the ranks differ, or one of them ended or failed.
        ScheduleError, CaptureError, OptionError: as `moeca_compile.calibrate`, on rank 0.
    """
    if unknown := {"prompts", "call"} & arguments.keys():
        raise OptionError(f"calibrate on several ranks: {', '.join(sorted(unknown))} can't be given; give draw instead")
    chosen = bound_arguments(model, draw, budget, arguments | {"resume": resume})
    request = Request.read(**{name: value for name, value in chosen.items() if name not in NOT_FOR_REQUESTS})
    if chosen["granularity"] == "auto" or (isinstance(chosen["truth"], str) and chosen["truth"] == CONVERGED):
        raise OptionError(
            "calibrate on several ranks: name the granularity ('region', 'stack', 'output'), and no truth='converged'"
        )
    goals: list[Goal] = []

    def read_goal() -> None:
        goals.append(goal_of(chosen["truth"], model, draw, request, chosen["granularity"]))

    _on_every_rank(read_goal, "while the arguments were read")
    check_ranks(model, budget=budget, arguments={name: _text(value) for name, value in sorted(arguments.items())})
    is_first = distributed.get_rank() == 0
    with reported(request, chosen["progress"] and is_first) as progress:
        own = request if is_first else replace(request, folder=None)
        studies = Studies(model, draw, chosen["inner"], goals[0], progress)
        study = studies.of(chosen["granularity"], own)
        _share_uncached(study)

        def search() -> str:
            return find_schedule(studies, own, chosen["granularity"]).to_json() if is_first else ""

        where = "" if resume is None else f". What was measured is in {str(resume)!r}"
        (text, *_) = _on_every_rank(search, f"while rank 0 searched{where}")
    return Schedule.from_json(text)


def _share_uncached(study: Study) -> None:
    """Draw the uncached samples that nothing else is measured on, each on one rank; rank 0 gets all of them."""
    every = (*study.request.seeds, *study.request.holdout)
    missing = [seed for seed in every if seed not in (every[0], *study.measured_seeds())]
    missing = [seed for seed in missing if study.store.truth(seed) is None]
    (first, *_) = _gather({"missing": missing}, "before seeds were drawn")  # rank 0 alone has the folder

    def draw_own() -> dict[int, tuple[Tensor, float]]:
        seeds = share(first["missing"])
        if seeds:
            study.sampled.run(every[0])  # compiles
        return {seed: (study.sampled.run(seed), study.sampled.uncached[-1]) for seed in seeds}

    drawn = _on_every_rank(draw_own, "while uncached samples were drawn")
    if distributed.get_rank() == 0:
        for samples in drawn:
            study.shared |= samples


def _compared(model: Any, further: Mapping[str, object]) -> dict[str, str]:
    """The facts of the model, once they and `further` are known to be equal on all ranks; see `check_ranks`."""
    of_model = identity(model)
    facts = of_model | {name: _digest(str(value)) for name, value in further.items()}
    by_rank = _gather(facts, "while the ranks were compared")
    differing = []
    for name in dict.fromkeys(name for rank_facts in by_rank for name in rank_facts):
        values: dict[str, list[int]] = {}
        for rank, rank_facts in enumerate(by_rank):
            values.setdefault(rank_facts.get(name, "nothing"), []).append(rank)
        if len(values) > 1:
            sides = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
            differing.append(f"{name} ({sides})")
    if differing:
        raise StateError(
            f"the ranks differ in {' and '.join(differing)}: nothing was sampled. Start all of them with the same "
            "packages, weights and schedule"
        )
    return of_model


def identity(model: Any) -> dict[str, str]:
    """What must be equal wherever the samples of one job are made; for schedulers of jobs that have no ranks, too.

    Args:
        model: compiled or plain; a pipeline or a list of models.

    Returns:
        Short texts by name: versions, checksums of the weights, and of the schedule and options of compiled models.

    Raises:
        StateError: no model.
    """
    modules = models_of(model, "identity")
    facts = {name: version(name) for name in ("moeca-compile", "torch", "numpy")}
    facts["python"] = platform.python_version()
    for number, module in enumerate(modules):
        place = f" of model {number}" if len(modules) > 1 else ""
        facts[f"weights{place}"] = weights_digest(plain_module(module))
        context = handle_of(module)
        compiler = None if context is None else backend_of(context)
        compiler = getattr(compiler, "compiler_fn", compiler)
        if isinstance(compiler, Backend):
            facts[f"schedule{place}"] = _digest(compiler.schedule.to_json())
            facts[f"options{place}"] = _digest(str(replace(compiler.options, schedule="")))
    return facts


def weights_digest(module: torch.nn.Module) -> str:
    """A checksum of names, types, shapes and bits of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers()), key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _text(value: Any) -> str:
    """A text that is the same on all ranks for the same argument, whatever its address in memory."""
    if isinstance(value, Mapping):
        return str({key: _text(entry) for key, entry in value.items()})
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
    is_object = isinstance(value, torch.nn.Module) or callable(value)
    return getattr(value, "__qualname__", type(value).__name__) if is_object else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_group() -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise StateError(
            "torch.distributed isn't initialized: start with torchrun, and call "
            "torch.distributed.init_process_group('gloo') first"
        )


def _gather(value: dict[str, Any], when: str) -> list[dict[str, Any]]:
    """The values of all ranks, by rank.

    Raises:
        StateError: a rank ended.
    """
    _require_group()
    values: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:  # the backends' own classes derive from it
        raise StateError(
            f"rank {distributed.get_rank()} lost another rank {when}. Start the job again with the same arguments "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
    return values


def _on_every_rank(work: Callable[[], Any], when: str) -> list[Any]:
    """What the work of each rank gives, by rank. All hear of a failure; else they would wait.

    Raises:
        StateError: another rank failed or ended. What the work raises on this rank is raised as it is.
    """
    failure: Exception | None = None
    answer: dict[str, Any] = {"result": None, "error": ""}
    try:
        answer["result"] = work()
    except Exception as error:
        failure, answer["error"] = error, f"{type(error).__name__}: {error}"
    answers = _gather(answer, when)
    if failure is not None:
        raise failure
    if failed := [f"rank {rank}: {other['error']}" for rank, other in enumerate(answers) if other["error"]]:
        raise StateError(
            f"the job failed on {'; '.join(failed)}. Mend that, and start it again with the same arguments"
        )
    return [other["result"] for other in answers]


def _check_job(facts: Mapping[str, str], folder: Path) -> None:
    """Record in the folder whose it is; rank 0 writes.

    Raises:
        StateError: its samples are of other weights or another schedule.
    """
    other: list[str] = []
    if distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / JOB
        stored = json.loads(file.read_text()) if file.exists() else facts
        other = sorted(name for name in {*stored, *facts} if stored.get(name) != facts.get(name))
        if not other:
            file.write_text(json.dumps(facts, indent=1))
    (first, *_) = _gather({"other": other}, "while the folder was looked at")
    if first["other"]:
        raise StateError(
            f"{str(folder)!r} holds samples made with other {', '.join(first['other'])}: give another folder"
        )


def _write(file: Path, samples: Tensor) -> None:
    part = file.with_suffix(f".part{distributed.get_rank()}.npy")
    np.save(part, samples.detach().cpu().numpy())
    part.replace(file)
