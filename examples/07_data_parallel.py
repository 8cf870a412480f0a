"""Draw digits on several processes, each with its own share of the seeds; `torchrun` starts them.

    torchrun --nproc-per-node 2 -m examples.07_data_parallel             # 16 seeds, into the folder digits_by_seed
    torchrun --nproc-per-node 2 -m examples.07_data_parallel --seeds 64 --schedule uniform:4

The samples are those of one process, bit for bit. A job that broke off draws what is missing when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import moeca_compile as moeca
from examples import digits
from moeca_compile.distributed import sample

DIGITS = 10  # of one seed
GUIDANCE = 2.0


def draw(model: Any, seed: int, steps: int = 50) -> Tensor:
    """The digits 0 to 9 (10,1,16,16) from the noise of a seed."""
    with moeca.trajectory(model, steps=steps):
        return digits.sample(model, seed=seed, n=DIGITS, steps=steps, cfg=GUIDANCE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw digits on several processes.")
    parser.add_argument("--seeds", type=int, default=16, help="how many, from 0 on (default 16)")
    parser.add_argument("--schedule", default="uniform:3", help="as moeca_compile.compile takes it (default uniform:3)")
    parser.add_argument("--folder", type=Path, default=Path("digits_by_seed"), help="where the samples go")
    parser.add_argument("--inner", default="inductor", help="inductor or eager (default inductor)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")  # "nccl" where each process has a GPU
    model = moeca.compile(digits.load_model(), schedule=args.schedule, inner=args.inner)
    samples = sample(model, draw, range(args.seeds), args.folder)
    if distributed.get_rank() == 0:
        accuracy = sum(digits.accuracy(x, digits.labels_of(DIGITS)) for x in samples.values()) / len(samples)
        print(f"{len(samples)} seeds on {distributed.get_world_size()} processes, class accuracy {accuracy:.3f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
