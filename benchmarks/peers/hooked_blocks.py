"""Caches of diffusers that hook a model's blocks: FirstBlockCache, MagCache, SeaCache.

They know the block classes of diffusers; another model's is registered with two names (`register`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import macs
from benchmarks.peers.way import bytes_in
from benchmarks.peers.workload import Batch, Workload
from examples.dit_moe import Block

TOKENS = {"x": 0, "hidden_states": 0}  # FirstBlockCache asks for "hidden_states" whatever the block calls its tokens


def register() -> None:
    """Let the hooks into examples/dit_moe.py; diffusers 0.42 has no public name for it."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(
        Block,
        TransformerBlockMetadata(
            return_hidden_states_index=0, hidden_states_argument_name="x", _cached_parameter_indices=TOKENS
        ),
    )


class HookedBlocks:
    """The model of a workload under one of these caches; called like the model. Its hooks can't be traced: where it is
    `compiled`, each block is by itself.

    Attributes:
        computed: full steps of the trajectory.
    """

    def __init__(self, work: Workload, apply: Callable[[Any, Any], None], config: Any, compiled: bool = False) -> None:
        from diffusers.hooks import HookRegistry

        register()
        self.work, self.module, self.config = work, work.prepared(), config
        (stack,) = work.stacks
        self.stack = stack
        self.computed = self.taken = 0
        blocks = list(self.module.get_submodule(stack))
        for block in blocks if compiled else ():
            block.forward = torch.compile(block.forward)
        blocks[-1].forward = self._counted(blocks[-1].forward)
        apply(self.module, config)
        self.registry = HookRegistry.check_if_exists_or_initialize(self.module)

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Count around what is compiled: equal blocks share one program, which has no counter of the last one."""

        @wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.computed += 1
            return forward(*args, **kwargs)

        return counted

    def restart(self) -> None:
        """What a pipeline does before each image."""
        self.computed = self.taken = 0
        self.registry.reset_stateful_hooks(recurse=True)

    def __call__(self, x: Tensor, t: Tensor, *others: Tensor) -> Any:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        sigma = float(t[0]) / 1000
        context = CacheContext("peers", self.taken, self.work.size.steps, sigma=sigma)
        _set_cache_context(self.module, context)
        self.taken += 1
        return self.module(x, t, *others)

    def states(self) -> Iterator[Any]:
        """What the hooks keep."""
        for module in self.module.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry else ():
                yield from hook.state_manager._state_cache.values() if hasattr(hook, "state_manager") else ()


class Setting:
    """One of these caches at one setting: fields of its configuration.

    head: blocks that run at every step.
    """

    def __init__(self, cache: HookedBlocks, head: int = 0, **fields: Any) -> None:
        self.cache, self.head, self.fields = cache, head, fields

    def sample(self, batch: Batch) -> Tensor:
        self.cache.restart()
        _set(self.cache, self.fields)
        return self.cache.work.draw(self.cache, batch)

    def computed(self) -> int:
        return self.cache.computed

    def macs(self) -> float:
        spared = macs.of_blocks(self.cache.work, self.cache.stack, but=self.head)
        return 1 - (1 - self.cache.computed / self.cache.work.size.steps) * spared

    def state_bytes(self) -> int:
        return bytes_in(list(self.cache.states()))

    def forget(self) -> None:
        self.cache.restart()


def _set(cache: HookedBlocks, fields: Mapping[str, Any]) -> None:
    """In the configuration that the hooks share, and in those hooks that keep a copy."""
    for name, value in fields.items():
        setattr(cache.config, name, value)
        for module in cache.module.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for hook in registry.hooks.values() if registry else ():
                if name in vars(hook):
                    setattr(hook, name, value)


def first_block_cache(work: Workload) -> HookedBlocks:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    return HookedBlocks(work, apply_first_block_cache, FirstBlockCacheConfig())


def mag_cache(work: Workload, batch: Batch, compiled: bool = False) -> HookedBlocks:
    """With ratios calibrated as its documentation has it: one uncached trajectory."""
    from diffusers import MagCacheConfig
    from diffusers.hooks import apply_mag_cache

    steps = work.size.steps
    # a step more than the trajectory has, or the hook forgets the ratios at its end
    measuring = HookedBlocks(work, apply_mag_cache, MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
    measuring.restart()
    work.draw(measuring, batch)
    (ratios,) = {tuple(state.calibration_ratios) for state in measuring.states() if state.calibration_ratios}
    config = MagCacheConfig(num_inference_steps=steps, mag_ratios=list(ratios))
    return HookedBlocks(work, apply_mag_cache, config, compiled)


def mag_computes(ratios: Tensor, threshold: float, max_skip_steps: int, retention_ratio: float) -> int:
    """How many steps MagCache computes, which its ratios and fields alone say."""
    steps = len(ratios)
    computed, product, error, skipped = 0, 1.0, 0.0, 0
    for step in range(steps):
        if step >= int(retention_ratio * steps + 0.5):
            product *= float(ratios[step])
            skipped += 1
            error += abs(1 - product)
            if step and error <= threshold and skipped <= max_skip_steps:
                continue
            product, error, skipped = 1.0, 0.0, 0
        computed += 1
    return computed


def sea_cache(work: Workload) -> HookedBlocks:
    from diffusers import SeaCacheConfig
    from diffusers.hooks import apply_sea_cache

    def latents(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Each image as a film of one frame: (C,1,H,W)."""
        return list(torch.unbind(args[0].unsqueeze(2)))

    return HookedBlocks(work, apply_sea_cache, SeaCacheConfig(raw_vision_callback=latents))
