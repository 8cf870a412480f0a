"""What the tests of several ranks run, each rank in a process of its own, which prints its result as JSON."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import moeca_compile as moeca
from moeca_compile.distributed import calibrate, check_ranks, sample
from moeca_compile.engine.trajectories.agreement import Agreement
from moeca_compile.errors import MoecaError
from moeca_compile.frontend import output_path
from moeca_compile.frontend.handles import states_of
from moeca_compile.runtime.driver import Agreed
from moeca_compile.schedule import Action, Schedule
from tests.context_parallel import flux_of_ranks
from tests.exchanged import ExchangedDiT
from tests.models import DiT
from tests.spread import Blocks, Untraced, Watch, cut, sharded

SEEDS = range(5)
STEPS = 4
ADAPTIVE = "adaptive:0.3"
CALIBRATION: dict[str, Any] = {
    "budget": "macs:0.5", "inner": "eager", "progress": False, "granularity": "region", "seeds": 3, "holdout": 2,
    "effort": 2, "data_range": 4.0, "max_variants": 2, "order": 1,
}  # fmt: skip


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DiT("numpy", depth=1, dim=16, hidden=24, heads=2).eval().requires_grad_(False)


def compiled(schedule: str = "uniform:2", seed: int = 0) -> Any:
    return moeca.compile(model(seed), schedule=schedule, inner="eager")


def draw(network: Any, seed: int) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), moeca.trajectory(network) if hasattr(network, "_orig_mod") else torch.no_grad():
        for step in range(STEPS):
            x = x - network(x, torch.full((1,), 1000.0 - 250 * step), torch.tensor([seed % 10]))[:, :4] / STEPS
    return x


def plain_draw(network: Any, seed: int) -> Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        x = x - network(x, torch.full((1,), 1000.0 - 250 * step), torch.tensor([seed % 10]))[:, :4] / STEPS
    return x


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except MoecaError as error:
        return str(error)
    return ""


def differing(rank: int, folder: Path) -> dict[str, Any]:
    """Ranks whose schedules, weights or arguments differ; then equal ones, which sample."""
    return {
        "schedule": refused(lambda: check_ranks(compiled(f"uniform:{2 + rank}"))),
        "weights": refused(lambda: check_ranks(model(seed=rank))),
        "further": refused(lambda: check_ranks(model(), resolution=256 * (rank + 1))),
        "samples": {seed: x.flatten().tolist() for seed, x in sample(compiled(), draw, SEEDS, folder).items()},
    }


def failing(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1's sampler raises at seed 3."""

    def fragile(network: Any, seed: int) -> Tensor:
        if seed == 3:
            raise ValueError("no seed 3")
        return draw(network, seed)

    try:
        sample(compiled(), fragile, SEEDS, folder)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def killed(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 ends at seed 3 as if it were killed."""

    def fatal(network: Any, seed: int) -> Tensor:
        if seed == 3:
            os._exit(9)
        return draw(network, seed)

    return {"error": refused(lambda: sample(compiled(), fatal, SEEDS, folder))}


def again(rank: int, folder: Path) -> dict[str, Any]:
    """The seeds that a job which goes on draws."""
    drawn = []

    def noted(network: Any, seed: int) -> Tensor:
        drawn.append(seed)
        return draw(network, seed)

    samples = sample(compiled(), noted, SEEDS, folder)
    return {"drawn": drawn, "samples": {seed: x.flatten().tolist() for seed, x in samples.items()}}


def calibrated(rank: int, folder: Path) -> dict[str, Any]:
    schedule = calibrate(model(), plain_draw, resume=folder / "calibration", **CALIBRATION)
    truth = {seed: plain_draw(compiled(), seed) for seed in (0, 1, 2, 1000, 1001)}
    aimed = calibrate(model(), plain_draw, truth=truth, **CALIBRATION)
    return {"schedule": schedule.to_json(), "to samples": aimed.to_json()}


def loop(network: Any, exchanges: list[int] | None = None) -> list[list[float]]:
    """The outputs of six steps, each from the one before; `exchanges` gets the number of collectives of each."""
    x, outputs = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)), []
    for step in range(6):
        with torch.profiler.profile() as profile:
            output = network(x, torch.tensor([1000.0 - 100 * step]))
        if exchanges is not None:
            names = [event.name for event in profile.events()]
            exchanges.append(sum("c10d" in name and "wait" not in name for name in names))
        x = x - output / 6
        outputs.append(output.flatten().tolist())
    return outputs


def spread(rank: int, folder: Path) -> dict[str, Any]:
    """Models that are spread over the ranks: plain, compiled in full, cached at the output."""
    import warnings

    from torch.distributed.device_mesh import init_device_mesh

    mesh, results = init_device_mesh("cpu", (2,)), {}

    def blocks() -> nn.Module:
        torch.manual_seed(0)
        return Blocks().eval().requires_grad_(False)

    for name, way in (("cut", cut), ("sharded", sharded)):
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exchanges: list[int] = []
            plain = loop(way(blocks(), mesh), exchanges)
            regions = moeca.compile(way(blocks(), mesh), schedule="uniform:2", inner="eager")
            uncached = loop(regions)
            outputs = moeca.compile(way(blocks(), mesh), schedule="uniform:2", inner="eager", granularity="output")
            cached_exchanges: list[int] = []
            cached = loop(outputs, cached_exchanges)
            whole = moeca.compile(blocks(), schedule="uniform:2", inner="eager", granularity="output")
            results[name] = {
                "plain": plain, "uncached": uncached, "cached": cached, "whole": loop(whole),
                "exchanges": exchanges, "cached_exchanges": cached_exchanges,
                "warnings": [str(warning.message) for warning in caught if "moeca" in str(warning.category).lower()],
            }  # fmt: skip
    return results


def random_schedule(rng: random.Random) -> Schedule:
    order = rng.randint(0, 2)
    actions = [action for action in Action if order or action is not Action.FORECAST]
    rows = [Action.COMPUTE] + [rng.choice(actions) for _ in range(rng.randint(1, 6))]
    return Schedule(tuple((action,) for action in rows), ("output",), granularity="output", order=order)


def delayed(rank: int, count: int, seconds: float, differs: bool = False) -> dict[str, Any]:
    """Random schedules of a model that is cut over the ranks, each rank with delays of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    network, watch = cut(Untraced().eval().requires_grad_(False), init_device_mesh("cpu", (2,))), Watch(seconds)
    schedules, delays, digest, begin = random.Random(0), random.Random(rank + 1), hashlib.sha256(), time.monotonic()
    computed = 0
    for number in range(count):
        schedule = random_schedule(schedules)
        if differs and rank and number == count - 1:
            schedule = replace(schedule, rows=tuple((Action.COMPUTE,) for _ in schedule.rows))
        handle = moeca.compile(network, schedule=schedule, inner="eager", granularity="output")
        x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(number))
        with torch.no_grad(), moeca.trajectory(handle):
            for step, (action,) in enumerate(schedule.rows):
                watch.at(f"schedule {number}, step {step}")
                if delays.random() < 0.3:
                    time.sleep(delays.expovariate(500))  # 2 ms on average
                x = x - handle(x, torch.tensor([1000.0 - 100 * step])) / 8
                computed += action is Action.COMPUTE
        digest.update(x.numpy().tobytes())
    watch.timer.cancel()
    return {
        "digest": digest.hexdigest(), "computed": computed, "seconds": time.monotonic() - begin,
        "warnings": list(moeca.stats(handle).warnings),
    }  # fmt: skip


def exchanging(rank: int, folder: Path) -> dict[str, Any]:
    """Experts that are spread over ranks: what the variants exchange, and whether `full` gives the model's bits."""
    torch.manual_seed(0)
    network = ExchangedDiT(ranks=2).eval().requires_grad_(False)
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(rank))
    result: dict[str, Any] = {}
    for schedule in ("full", "uniform:3"):
        handle, seen, y = moeca.compile(network, schedule=schedule, inner="eager"), [], x
        with torch.no_grad(), moeca.trajectory(handle):
            for step in range(6):
                t = torch.full((1,), 1000.0 - 100 * step)
                given = handle(y, t)
                seen.append(bool(torch.equal(given, network(y, t))))
                y = y - given / 6
        result[schedule] = {"equal": seen, "output": y.flatten().tolist()}
    (program,) = (program for state in states_of(handle) for program in state.runtime.programs.values())
    for row in program.schedule.distinct_rows():
        variant = program.variant(row)
        sent = [node.meta["val"] for node in variant.gm.graph.nodes if "all_to_all" in str(node.target)]
        result[variant.name] = {"collectives": len(sent), "bytes": sum(one.nbytes for one in sent)}
    return result


def adapting(rank: int, folder: Path) -> dict[str, Any]:
    """An adaptive schedule over ranks whose samples move at different speeds: each would choose other steps."""
    torch.manual_seed(0)
    handle = moeca.compile(ExchangedDiT(ranks=2).eval().requires_grad_(False), schedule=ADAPTIVE, inner="eager")
    pairs: list[tuple[float | None, float | None]] = []
    agree = Agreement.__call__

    def noted(self: Agreement, is_cold: bool, row: int, drift: float | None) -> Agreed:
        agreed = agree(self, is_cold, row, drift)
        pairs.append((drift, agreed.drift))
        return agreed

    Agreement.__call__ = noted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(rank)
    x, direction = torch.randn(1, 16, 4, generator=generator), torch.randn(1, 16, 4, generator=generator)
    with torch.no_grad(), moeca.trajectory(handle, stream="one"):
        for step in range(12):
            handle(x + (0.02, 0.2)[rank] * step * direction, torch.full((1,), 1000.0 - 10 * step))
    records = moeca.stats(handle).steps
    with torch.no_grad(), warnings.catch_warnings(), moeca.trajectory(handle, stream="two"):
        warnings.simplefilter("ignore")  # one rank's samples aren't finite: its state is dropped
        for step in range(4):
            handle(x * (float("nan") if rank and step == 1 else 1.0), torch.full((1,), 800.0 - step))
    after = moeca.stats(handle).steps
    return {
        "variants": [record.variant for record in records], "pairs": pairs,
        "after": [(record.variant, record.cold) for record in after],
    }  # fmt: skip


def changing(rank: int, folder: Path) -> dict[str, Any]:
    """Weights of rank 1 alone are written before step 4, which both would take from the cache."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    watch, result = Watch(30), dict[str, Any]()
    tokens, experts = torch.randn(1, 8, 16), torch.randn(1, 16, 4)
    cases: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {
        "regions": (ExchangedDiT(ranks=2).eval(), experts, {"schedule": "uniform:3"}),
        "adaptive": (ExchangedDiT(ranks=2).eval(), experts, {"schedule": "adaptive:0.5"}),
        "cut": (
            cut(Untraced().eval(), init_device_mesh("cpu", (2,))), tokens,
            {"schedule": "uniform:3", "granularity": "output"},
        ),
    }  # fmt: skip
    for name, (network, x, options) in cases.items():
        handle, outputs = moeca.compile(network.requires_grad_(False), inner="eager", **options), []
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught, moeca.trajectory(handle):
            warnings.simplefilter("always")
            for step in range(6):
                watch.at(f"{name}, step {step}")
                t = torch.tensor([1000.0 - step])
                if step == 4 and rank:
                    list(network.parameters())[-1].mul_(1.0)  # the values stay, so the ranks' results can be compared
                outputs.append(handle(x + step / 100, t))
            computed = network(x + 0.04, torch.tensor([996.0]))
        result[name] = {
            "steps": [(record.variant, record.cold) for record in moeca.stats(handle).steps],
            "difference": float((outputs[4] - computed).abs().max()),
            "warnings": [str(warning.message) for warning in caught],
        }
    watch.timer.cancel()
    return result


def context_parallel(rank: int, folder: Path) -> dict[str, Any]:
    return flux_of_ranks()


def schedules(rank: int, folder: Path) -> dict[str, Any]:
    return delayed(rank, 1000, 60)


def disagreeing(rank: int, folder: Path) -> dict[str, Any]:
    """In the last schedule, rank 1 computes every step."""
    return delayed(rank, 3, 30, differs=True)


def silent(rank: int, folder: Path) -> dict[str, Any]:
    """The same, without the comparison before each step."""
    output_path.agreement_of_weights = lambda weights: None  # type: ignore[attr-defined]
    result = delayed(rank, 3, 10, differs=True)
    time.sleep(20)  # a rank that ends would be an error for the other one, which is to wait
    return result


def run(what: str, folder: Path, ranks: int = 2, limit: float = 300) -> list[tuple[int | None, Any]]:
    """Exit status and result of each rank. Ranks are forked from a process that has imported all that they need: by
    themselves they would import for six seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "networkx", "torch._inductor.compile_fx"])  # torch imports these late
    outputs = [folder / f"{what}_{rank}.out" for rank in range(ranks)]
    meeting = folder / f"meeting_{what}"
    processes = [context.Process(target=main, args=(what, rank, meeting, outputs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    results = []
    for process, output in zip(processes, outputs, strict=True):
        process.join(limit)
        assert process.exitcode is not None, f"rank {len(results)} hangs"
        lines = [line for line in output.read_text().splitlines() if line.startswith("{")]
        results.append((process.exitcode, json.loads(lines[-1]) if lines else None))
    return results


def main(what: str, rank: int, meeting: Path, outputs: list[Path]) -> None:
    os.dup2(os.open(outputs[rank], os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(outputs), timeout=timedelta(seconds=120)
    )
    sys.stdout.write(json.dumps(globals()[what](rank, meeting.parent / "samples")) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a group whose other rank is gone waits when it is destroyed
