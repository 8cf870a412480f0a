"""Draw digits from a bundle: the process that draws them has numpy and a runtime, and can't import torch.

    python -m examples.04_serve_bundle                 # export if there is no bundle yet, serve, compare with torch
    python -m examples.04_serve_bundle --provider openvino
    python -m examples.04_serve_bundle --json          # the figures as one line of JSON
    python -m examples.04_serve_bundle --serve digits.moeca noise.npy digits.npy     # the serving process alone

The noise is the same for all, so what is compared is one and the same sample.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.samplers import euler, guided, model_of
from moeca_compile.runtime import Session
from moeca_compile.runtime.providers.onnxruntime import CPU

SCHEDULE = "uniform:3"
GUIDANCE = 2.0
CLASSES = 10
COUNT = 32


def serve(bundle: Path, noise: Path, out: Path, steps: int, provider: str) -> dict[str, Any]:
    """Draw as many digits as `noise` (N,1,16,16) has samples, 0 to 9 in turn, and save them."""
    session = Session.open(bundle, provider, threads=1)
    x = np.load(noise, allow_pickle=False)
    labels = np.arange(len(x)) % CLASSES
    seconds, stats = [], None
    for _ in range(2):  # the first run also allocates
        begin = time.perf_counter()
        with session.trajectory(steps=steps) as trajectory:
            model = guided(model_of(trajectory), np.full_like(labels, CLASSES), GUIDANCE)
            digits = euler(model, x, labels, np.linspace(1, 0, steps + 1), time_scale=1000.0)
            stats = trajectory.stats()
        seconds.append(time.perf_counter() - begin)
    np.save(out, digits)
    return {"seconds": min(seconds), "mac_fraction": stats.mac_fraction, "torch": sys.modules.get("torch") is not None}


def export(bundle: Path, show: bool) -> None:
    """The part that needs torch and the model's code."""
    import torch

    import moeca_compile as moeca
    from examples import digits

    noise = digits.initial_noise(seed=0, n=2)
    inputs = noise, torch.full((2,), 1000.0), digits.labels_of(2)
    moeca.export(digits.load_model(), inputs, SCHEDULE, bundle, progress=show)


def in_torch(steps: int, count: int) -> tuple[Any, Any, float]:
    """The same digits from torch: with the schedule, node by node; and all computed, as the model is, with its time."""
    import torch

    import moeca_compile as moeca
    from examples import digits

    torch.set_num_threads(1)
    cached = moeca.compile(digits.load_model(), schedule=SCHEDULE, inner="eager")
    moeca.warmup(cached, *_example(count))
    with moeca.trajectory(cached, steps=steps):
        wanted = digits.sample(cached, seed=0, n=count, steps=steps, cfg=GUIDANCE)
    plain = digits.load_model()
    digits.sample(plain, seed=0, n=count, steps=1)
    begin = time.perf_counter()
    full = digits.sample(plain, seed=0, n=count, steps=steps, cfg=GUIDANCE)
    return wanted, full, time.perf_counter() - begin


def _example(count: int) -> tuple[Any, Any, Any]:
    import torch

    from examples import digits

    x, labels = digits.initial_noise(0, count), digits.labels_of(count)
    return torch.cat([x, x]), torch.full((2 * count,), 1000.0), torch.cat([labels, torch.full_like(labels, CLASSES)])


def compare(bundle: Path, steps: int, count: int, provider: str) -> dict[str, Any]:
    """Serve in another process, and hold the digits against torch's."""
    import torch

    from examples import digits

    with tempfile.TemporaryDirectory() as folder:
        noise, out = Path(folder, "noise.npy"), Path(folder, "digits.npy")
        np.save(noise, digits.initial_noise(seed=0, n=count).numpy())
        command = [
            sys.executable,
            "-m",
            "examples.04_serve_bundle",
            "--serve",
            bundle,
            noise,
            out,
            "--steps",
            str(steps),
            "--provider",
            provider,
        ]
        served = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found = torch.from_numpy(np.load(out))
    wanted, full, torch_seconds = in_torch(steps, count)
    return {
        "torch_in_the_serving_process": served["torch"],
        "psnr_db_to_torch_with_this_schedule": digits.psnr(found, wanted).min().item(),
        "psnr_db_to_all_computed": digits.psnr(found, full).mean().item(),
        "class_accuracy": digits.accuracy(found, digits.labels_of(count)),
        "seconds_bundle": served["seconds"],
        "seconds_torch_all_computed": torch_seconds,
        "speedup": torch_seconds / served["seconds"],
        "mac_fraction": served["mac_fraction"],
        "steps": steps,
        "digits": count,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw digits from a bundle without torch.")
    parser.add_argument("--bundle", type=Path, default=Path("digits.moeca"), help="made if it isn't there")
    parser.add_argument("--serve", nargs=3, type=Path, metavar=("BUNDLE", "NOISE", "OUT"), help="only serve")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--digits", type=int, default=COUNT, help=f"how many (default {COUNT})")
    parser.add_argument("--provider", default=CPU, help=f"what runs it, such as openvino (default {CPU})")
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")
    args = parser.parse_args(argv)
    if args.serve:
        sys.modules["torch"] = None  # type: ignore[assignment] # from here on importing it fails
        print(json.dumps(serve(*args.serve, steps=args.steps, provider=args.provider)))
        return
    if not args.bundle.exists():
        export(args.bundle, show=not args.json)
    figures = compare(args.bundle, args.steps, args.digits, args.provider)
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<38}{f'{value:.3f}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
