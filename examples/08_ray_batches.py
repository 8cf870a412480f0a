"""Draw digits on the machines of a Ray cluster, from a bundle or with a torch model; each worker opens it once.

    python -m examples.08_ray_batches                              # 64 digits from digits.moeca, into ray_digits/
    python -m examples.08_ray_batches --torch --schedule uniform:4 # the model itself on each worker
    python -m examples.08_ray_batches --address auto --workers 16  # a running cluster; each node has the bundle

Each digit is a file of its own, written here when it comes. Digits of a lost worker are drawn again by another one. A
job that broke off draws what is missing when it is started again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STEPS, CLASSES, GUIDANCE = 50, 10, 2.0
TOGETHER = 8  # digits that a worker gets at once
BUDGET = 64 * 2**20  # bytes of their state
JOB = "job.json"

Rows = dict[str, Any]


class Drawn(NamedTuple):
    """A digit that is written.

    Attributes:
        seed: its number.
        worker: address of the node, and the process that drew it.
        done: how many of the job are written.
    """

    seed: int
    worker: tuple[str, int]
    done: int


class BundleWorker:
    """Opens a bundle once.

    Args:
        bundle: its path on every node.
        steps: denoising steps.
        memory: "shared": the weights are mapped, and the workers of a node share their pages; digits are drawn one
            after another, since without repacked weights onnxruntime rounds by the batch. "speed": each worker has its
            own weights, and its digits share calls.
    """

    def __init__(self, bundle: str, steps: int = STEPS, memory: str = "shared") -> None:
        from moeca_compile.errors import MoecaError
        from moeca_compile.runtime import BatchedSession, Session

        self.steps = steps
        try:
            self.session = Session.open(bundle, memory=memory, threads=1)
            self.batched = BatchedSession(self.session, BUDGET, 2 * TOGETHER) if memory == "speed" else None
        except MoecaError as error:
            raise RuntimeError(f"node {node()} can't open the bundle {bundle!r}: {error}") from None
        self.identity = {"bundle": self.session.manifest.id, "runtime": self.session.runtime.version()}
        self.identity |= {name: version(name) for name in ("moeca-compile", "numpy")}
        self.identity |= {"steps": str(steps), "memory": memory}

    def __call__(self, rows: Rows) -> Rows:
        seeds = [int(seed) for seed in rows["seed"]]
        if self.batched is None:
            return answer(rows, [self._alone(seed) for seed in seeds], self.identity)
        requests = [self.batched.submit(digit(seed, self.steps), self.steps) for seed in seeds]
        self.batched.run()
        return answer(rows, [request.result() for request in requests], self.identity)

    def _alone(self, seed: int) -> Any:
        with self.session.trajectory(self.steps) as trajectory:
            return drive(digit(seed, self.steps), trajectory.run)


class TorchWorker:
    """Loads and compiles the model once.

    Args:
        schedule: as `moeca_compile.compile` takes it.
        inner: "inductor" or "eager".
        steps: denoising steps.
    """

    def __init__(self, schedule: str, inner: str = "inductor", steps: int = STEPS) -> None:
        import torch

        import moeca_compile as moeca
        from examples import digits
        from moeca_compile.distributed import identity

        torch.set_num_threads(1)
        self.model, self.steps = moeca.compile(digits.load_model(), schedule=schedule, inner=inner), steps
        self.identity = identity(self.model) | {"steps": str(steps)}

    def __call__(self, rows: Rows) -> Rows:
        return answer(rows, [torch_digit(self.model, int(seed), self.steps) for seed in rows["seed"]], self.identity)


def digit(seed: int, steps: int = STEPS) -> Generator[dict[str, Any], Mapping[str, Any], Any]:
    """The sampler of one digit (1,1,16,16), of class `seed % 10`; it yields inputs and is sent outputs."""
    x = np.random.default_rng(seed).standard_normal((1, 1, 16, 16), dtype=np.float32)
    labels = np.array([seed % CLASSES, CLASSES])
    for now, after in itertools.pairwise(np.linspace(1, 0, steps + 1)):
        outputs = yield {"x": np.concatenate([x, x]), "t": np.full(2, 1000 * now, np.float32), "y": labels}
        with_label, without = np.split(outputs["output"], 2)
        x = x + np.float32(after - now) * (without + np.float32(GUIDANCE) * (with_label - without))
    return x


def torch_digit(model: Any, seed: int, steps: int = STEPS) -> Any:
    """The same digit from a torch model."""
    import torch

    import moeca_compile as moeca

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        x, t, y = (torch.from_numpy(inputs[name]) for name in ("x", "t", "y"))
        return {"output": model(x, t, y).numpy()}

    with torch.no_grad(), moeca.trajectory(model, steps=steps):
        return drive(digit(seed, steps), run)


def drive(sampler: Generator[Any, Any, Any], run: Callable[[Any], Any]) -> Any:
    """The result of a sampler whose steps `run` makes."""
    try:
        inputs = next(sampler)
        while True:
            inputs = sampler.send(run(inputs))
    except StopIteration as end:
        return end.value


def answer(rows: Rows, samples: list[Any], identity: Mapping[str, str]) -> Rows:
    count, text = len(samples), json.dumps(identity, sort_keys=True)
    return {
        "seed": rows["seed"],
        "sample": np.concatenate(samples),
        "node": np.array([node()] * count),
        "process": np.full(count, os.getpid()),
        "identity": np.array([text] * count),
    }


def node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def generate(
    worker: type, arguments: Mapping[str, Any], seeds: Iterable[int], folder: Path, workers: int = 2
) -> Iterator[Drawn]:
    """Draw seeds on the workers of the running Ray cluster, those whose files are missing.

    Args:
        worker: `BundleWorker` or `TorchWorker`.
        arguments: for it.
        seeds: what to draw; each once.
        folder: on this machine: `<seed>.npy` for each, and whose job it is.
        workers: processes, each with one CPU.

    Yields:
        What was drawn, as it is written.

    Raises:
        RuntimeError: a worker can't open the bundle or failed, or workers (or an earlier job) have other weights,
            schedules or versions.
    """
    import ray

    every = list(seeds)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in every if not (folder / f"{seed}.npy").exists()]
    if not missing:
        return
    blocks = -(-len(missing) // TOGETHER)
    rows = ray.data.from_items([{"seed": seed} for seed in missing], override_num_blocks=blocks).map_batches(
        worker, fn_constructor_kwargs=dict(arguments), batch_size=TOGETHER, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
    )  # fmt: skip
    done = len(every) - len(missing)
    try:
        for row in rows.iter_rows():
            _check_job(folder, json.loads(row["identity"]), row["node"])
            _write(folder / f"{row['seed']}.npy", row["sample"])
            done += 1
            yield Drawn(int(row["seed"]), (row["node"], int(row["process"])), done)
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"{str(error).strip().splitlines()[-1]}. What is done is in {str(folder)!r}: start again to go on"
        ) from error


def _check_job(folder: Path, identity: dict[str, str], where: str) -> None:
    """All samples of a folder come from the same weights, schedule and versions."""
    file = folder / JOB
    if not file.exists():
        file.write_text(json.dumps(identity))
    job = json.loads(file.read_text())
    if other := sorted(name for name in {*job, *identity} if job.get(name) != identity.get(name)):
        sides = "; ".join(f"{name} {identity.get(name)}, not {job.get(name)}" for name in other)
        raise RuntimeError(f"node {where} differs from the job in {str(folder)!r}: {sides}")


def _write(file: Path, sample: Any) -> None:
    part = file.with_suffix(".part.npy")
    np.save(part, sample)
    part.replace(file)


def export(bundle: Path) -> None:
    import torch

    import moeca_compile as moeca
    from examples import digits

    inputs = digits.initial_noise(0, 2), torch.full((2,), 1000.0), digits.labels_of(2)
    moeca.export(digits.load_model(), inputs, "uniform:3", bundle)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw digits on a Ray cluster.")
    parser.add_argument("--seeds", type=int, default=64, help="how many, from 0 on (default 64)")
    parser.add_argument("--bundle", type=Path, default=Path("digits.moeca"), help="made if it isn't there")
    parser.add_argument("--memory", default="shared", help="of the bundle's weights: shared or speed (default shared)")
    parser.add_argument("--torch", action="store_true", help="torch models in place of the bundle")
    parser.add_argument("--schedule", default="uniform:3", help="of the torch models (default uniform:3)")
    parser.add_argument("--inner", default="inductor", help="of the torch models: inductor or eager")
    parser.add_argument("--folder", type=Path, default=Path("ray_digits"), help="where the digits go")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--address", help="of a running cluster; without it one is started here")
    args = parser.parse_args(argv)
    import ray

    local: dict[str, Any] = {} if args.address else {"num_cpus": args.workers, "include_dashboard": False}
    ray.init(address=args.address, log_to_driver=False, **local)
    worker, arguments = TorchWorker, {"schedule": args.schedule, "inner": args.inner}
    if not args.torch:
        if not args.address and not args.bundle.exists():
            export(args.bundle)
        worker, arguments = BundleWorker, {"bundle": str(args.bundle.absolute()), "memory": args.memory}
    try:
        for drawn in generate(worker, arguments, range(args.seeds), args.folder, args.workers):
            print(f"\r{drawn.done} of {args.seeds} digits, the last from {drawn.worker[0]}", end="", file=sys.stderr)
    except RuntimeError as error:
        raise SystemExit(f"\n{error}") from None
    print(f"\n{args.seeds} digits in {args.folder}")


if __name__ == "__main__":
    main()
