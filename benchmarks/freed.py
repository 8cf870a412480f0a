"""Memory of the process before and after `free_hoisted="drop"`: a DiT of which adaLN is a third, random weights.

    python -m benchmarks.freed    # half a minute

Resident memory as Linux tells it (/proc/self/statm), after the allocator gave back what it can. The model is DiT-MoE of
examples/dit_moe.py with 2 experts in each of 4 blocks, 1024 channels, on the CPU, inner="eager", schedule `full`.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch
from torch import nn

import moeca_compile as moeca
from examples.dit_moe import dit_moe

TIMES = [1000.0, 750.0, 500.0, 250.0]


def resident() -> int:
    """Bytes of resident memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages of all parameters."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def sample(model: nn.Module) -> torch.Tensor:
    """Four Euler steps of one image."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), moeca.trajectory(model, timesteps=TIMES):
        for time in TIMES:
            x = x - model(x, torch.full((2,), time), torch.tensor([3, 1000]))[:, :4] / len(TIMES)
    return x


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "depth": 4, "num_heads": 16, "num_experts": 2, "input_size": 8}
    model = dit_moe("S/2-8E2A", **sizes).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    expected = sample(moeca.compile(model, schedule="full", inner="eager"))
    compiled = moeca.compile(model, schedule="full", inner="eager", free_hoisted="drop")
    weights, before = weight_bytes(model), resident()
    same = torch.equal(sample(compiled), expected)
    after, left = resident(), weight_bytes(model)
    mega = 1e6
    print(f"weights {weights / mega:.0f} MB, after {left / mega:.0f} MB")
    stats = moeca.stats(compiled)
    print(f"told {stats.freed_bytes / mega:.0f} MB; resident memory fell by {(before - after) / mega:.0f} MB")
    print(f"stored values {stats.hoisted_bytes / mega:.2f} MB; results equal bit for bit: {same}")


if __name__ == "__main__":
    main()
