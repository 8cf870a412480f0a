"""The caches of diffusers that aren't measured on a model, and why, tried here and now.

Their hooks know the block classes of diffusers. Those of examples/dit_moe.py are registered first: then they let the
model in. Which lists of blocks they look for can't be registered.
"""

from __future__ import annotations

from benchmarks.peers import hooked_blocks
from benchmarks.peers.workload import Workload

UNTRIED = {"moeca calibrated": "there is no quality to calibrate for"}

UNKNOWN = "it finds no list of blocks by a name that it knows"
ELSEWHERE = "its quality is told on the digits (docs/peers.md), its time isn't"


def left_out(work: Workload) -> dict[str, str]:
    """By contender why it isn't measured; those of diffusers by their own words."""
    return {**UNTRIED, **tried(work)}


def tried(work: Workload) -> dict[str, str]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig
    from diffusers.hooks import apply_first_block_cache, apply_mag_cache

    hooked_blocks.register()
    # ratios are calibrated for each model; with ones it would add no error, and so cache at every step
    mag = MagCacheConfig(num_inference_steps=work.size.steps, mag_ratios=[1.0] * work.size.steps)
    found: dict[str, str] = {}
    for name, apply, config in (
        ("FirstBlockCache (diffusers)", apply_first_block_cache, FirstBlockCacheConfig()),
        ("MagCache (diffusers)", apply_mag_cache, mag),
    ):
        model = work.shipped()
        try:
            apply(model, config)
        except Exception as error:  # whatever it is, the page says it
            found[name] = f"{UNKNOWN}: {type(error).__name__}, {_gist(error)}"
            continue
        hooked = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
        blocks = len([module for module in hooked if module is not model])
        found[name] = f"hooks {blocks} blocks; {ELSEWHERE if blocks else UNKNOWN}"
    return found


def _gist(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else "no message"
