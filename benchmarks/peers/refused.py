"""The caches of diffusers that a model doesn't let in: what they say, tried here and now."""

from __future__ import annotations

from benchmarks.peers.workload import Workload

UNTRIED = {"moeca calibrated": "there is no quality to calibrate for"}


def left_out(work: Workload) -> dict[str, str]:
    """By contender why it isn't measured; those of diffusers by their own words."""
    return {**UNTRIED, **tried(work)}


def tried(work: Workload) -> dict[str, str]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig
    from diffusers.hooks import apply_first_block_cache, apply_mag_cache

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
            found[name] = f"refuses the model, {type(error).__name__}: {_gist(error)}"
        else:
            hooked = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
            blocks = len([module for module in hooked if module is not model])
            found[name] = f"is applied without an error and hooks {blocks} blocks"
    return found


def _gist(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else "no message"
