"""Drives a served bundle whose sequences share calls, in the server's environment: each sequence in a thread, from a
moment of its own on. Reads and writes .npz.

    python drive_shared.py URL MODEL STEPS.npz OUTPUTS.npz
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import http

sys.path.insert(0, str(Path(__file__).parent))
from drive import call


def run(url: str, model: str, number: int, inputs: dict[str, Any], wait: float) -> Any:
    """All steps of one sequence. Triton's one sample is a whole call, so each tensor gets an axis in front."""
    client = http.InferenceServerClient(url)
    time.sleep(wait)
    steps = len(next(iter(inputs.values())))
    outputs = []
    for step in range(steps):
        now = {name: array[step][None] for name, array in inputs.items()}
        outputs.append(call(client, model, now, number, step == 0, step == steps - 1)[0])
    return np.stack(outputs)


def main(url: str, model: str, given: str, out: str) -> None:
    sequences: dict[int, dict[str, Any]] = {}
    with np.load(given, allow_pickle=False) as data:
        for key in data.files:
            number, name = key.split(":")
            sequences.setdefault(int(number), {})[name] = data[key]
    dice = random.Random(0)
    with ThreadPoolExecutor(len(sequences)) as pool:
        running = {
            str(number): pool.submit(run, url, model, number, inputs, dice.random() / 10)
            for number, inputs in sequences.items()
        }
    np.savez(out, **{number: future.result() for number, future in running.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
