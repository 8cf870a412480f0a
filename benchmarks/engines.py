"""The committed fitted schedules in bundles: have their samples the same quality on each engine as in torch?

    python -m benchmarks.engines                  # about 20 minutes on one core; writes results/engines.json
    python -m benchmarks.engines --task glyphs    # the glyphs model; writes results/engines_glyphs.json
    python -m benchmarks.engines --quick          # one schedule, few samples: does it run?
    python -m benchmarks.engines --report         # the table of docs/fitted.md (with --task, of that one)

The held-out samples of `python -m benchmarks.fitted`, whose folder has them from torch. No time is told here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import moeca_compile as moeca
from benchmarks import fitted
from benchmarks.fitted import CONVERGED, FIRST_SEED, PAGE, UNCACHED, Bench, computed
from benchmarks.pages import write_held_out
from benchmarks.paired import interval, paired, psnr
from benchmarks.protocol import RESULTS, arguments, folder_of, pin_threads, save
from benchmarks.tasks import DIGITS, TASKS
from benchmarks.together import ORDERS
from moeca_compile.runtime import Session
from moeca_compile.schedule import Schedule

PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "OpenVINO": "openvino"}
QUICK = replace(fitted.WHOLE, held_out=1, batch=4)  # of the committed schedules
CASES = ((UNCACHED, 34), (CONVERGED, 34), (CONVERGED, 20))
MARKS = {
    "digits": "<!-- python -m benchmarks.engines --report -->",
    "glyphs": "<!-- python -m benchmarks.engines --task glyphs --report -->",
}
HEADS = ("fitted to", "computed of 50", "engine", "to that truth, dB", "less torch, dB", "from torch's samples, dB")


def drawn(bench: Bench, schedule: Schedule, provider: str) -> Tensor:
    """The held-out samples from a bundle, by guidance in one batch; its size is that of the calls."""
    size, task = bench.size, bench.task
    model = task.load().requires_grad_(False)
    labels = torch.full((2 * size.batch,), task.classes)
    inputs = task.noise(0, size.batch).repeat(2, 1, 1, 1), torch.full((2 * size.batch,), 500.0), labels
    with TemporaryDirectory(prefix="moeca_") as folder:
        bundle = moeca.export(
            model, inputs, schedule, Path(folder) / "bundle", granularity="output", targets=("onnx", "openvino")
        )
        names = ("x", "t", "y")
        session, images = Session.open(bundle.path, provider, threads=1), []
        sample = task.sampler(size.batch, size.steps)
        for seed in range(FIRST_SEED, FIRST_SEED + size.held_out):
            with session.trajectory(steps=size.steps) as trajectory:

                def run(*given: Tensor, trajectory: Any = trajectory) -> Tensor:
                    feeds = dict(zip(names, (one.numpy() for one in given), strict=True))
                    return torch.from_numpy(next(iter(trajectory.run(feeds).values())))

                images.append(sample(run, seed))
    return torch.cat(images)


def measure(bench: Bench, cases: Sequence[tuple[str, int]], console: Console) -> dict[str, Any]:
    """The figures of each engine."""
    lines = []
    for truth, share in cases:
        wanted, schedule = bench.samples(truth, order=ORDERS[truth]), bench.schedule(share, truth)
        of_torch = bench.samples(f"output_fitted_to_{truth}_{share}", schedule)
        base = psnr(of_torch, wanted)
        head = {"truth": truth, "computed": computed(schedule)}
        lines.append({**head, "engine": "torch", "psnr_db": interval(base)})
        for engine, provider in PROVIDERS.items():
            images = drawn(bench, schedule, provider)
            values = psnr(images, wanted)
            line = {**head, "engine": engine, "psnr_db": interval(values), "less_torch_db": paired(values, base)}
            lines.append({**line, "to_torch_db": interval(psnr(images, of_torch))})
            console.print(lines[-1], highlight=False)
    return {"task": bench.task.name, "samples": len(base), "lines": lines}


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = []
    for line in result["lines"]:
        mean, half = line["psnr_db"]
        less = "{:+.3f} ± {:.3f}".format(*line["less_torch_db"]) if "less_torch_db" in line else ""
        near = f"{line['to_torch_db'][0]:.0f}" if "to_torch_db" in line else ""
        rows.append([line["truth"], str(line["computed"]), line["engine"], f"{mean:.2f} ± {half:.2f}", less, near])
    return rows


def report(results: Path, page: Path) -> None:
    """Write the table of a task into the page, between its two marks."""
    write_held_out(results, page, MARKS, HEADS, rows_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "one schedule, few samples")
    parser.add_argument("--task", choices=TASKS, default=DIGITS.name, help="the model; default digits")
    parser.add_argument("--fitted", type=Path, help=f"the folder of benchmarks.fitted; default in {fitted.WORK}")
    parser.add_argument("--report", action="store_true", help=f"only write {PAGE}")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    name = task.results_of("engines")
    if args.report:
        report(RESULTS / f"{name}.json", PAGE)
        return
    pin_threads()
    work = args.fitted or fitted.WORK / f"{'quick_engines_' if args.quick else ''}{args.task}"
    cases = ((UNCACHED, 20),) if args.quick else CASES
    result = measure(Bench(QUICK if args.quick else fitted.WHOLE, work, task), cases, Console(width=180))
    folder = folder_of(args)
    if folder is not None:
        save(name, result, folder)


if __name__ == "__main__":
    main()
