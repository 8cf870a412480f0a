"""TaylorSeer by the hooks of diffusers: each attention and MoE module's output is extrapolated between full steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers import macs
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import Batch, Workload

WARMUP = 3  # the default, disable_cache_before_step
HOOK = "taylorseer_cache"
LAST = "final_layer"  # of examples/dit_moe.py: what the lite mode forecasts

Compiled = Literal["no", "modules", "whole"]


class TaylorSeer:
    """The hooked model. Under "modules" each hooked module's own forward is compiled and the hooks stay outside.

    lite: forecast what the last module gives and skip the blocks, as its lite mode does in models of diffusers (whose
    patterns don't fit the names here).
    """

    def __init__(self, work: Workload, order: int, compiled: Compiled, lite: bool = False) -> None:
        from diffusers import TaylorSeerCacheConfig
        from diffusers.hooks import HookRegistry, apply_taylorseer_cache

        self.module = work.prepared()
        names = [LAST] if lite else work.names(self.module)
        owners = [self.module.get_submodule(name) for name in names]
        if compiled == "modules":
            for owner in owners:
                owner.forward = torch.compile(owner.forward)
        config = TaylorSeerCacheConfig(
            disable_cache_before_step=WARMUP,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[LAST] if lite else list(work.modules),
            skip_predict_identifiers=[rf"({'|'.join(work.stacks)})\.\d+"] if lite else None,
        )
        apply_taylorseer_cache(self.module, config)
        self.registry = HookRegistry.check_if_exists_or_initialize(self.module)
        hooked = [module for module in self.module.modules() if hasattr(module, "_diffusers_hook")]
        self.hooks = [hook for module in hooked if (hook := module._diffusers_hook.get_hook(HOOK)) is not None]
        self.model = torch.compile(self.module) if compiled == "whole" else self.module

    def restart(self, interval: int, warmup: int, cooldown: int | None = None) -> None:
        """What a pipeline of diffusers does before each image; 0.42 has no public call for it."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        self.registry.reset_stateful_hooks(recurse=True)
        _set_cache_context(self.module, CacheContext("peers"))
        for hook in self.hooks:
            hook.cache_interval, hook.disable_cache_before_step = interval, warmup
            hook.disable_cache_after_step = cooldown


def computes(step: int, interval: int, warmup: int, cooldown: int | None) -> bool:
    """diffusers counts the interval from the step after the warm-up; from the cool-down on all is computed."""
    return step < warmup or (step - warmup - 1) % interval == 0 or (cooldown is not None and step >= cooldown)


class Interval:
    """`TaylorSeer` at one interval."""

    def __init__(
        self, seer: TaylorSeer, work: Workload, interval: int, warmup: int = WARMUP, cooldown: int | None = None
    ) -> None:
        self.seer, self.work = seer, work
        self.interval, self.warmup, self.cooldown = interval, warmup, cooldown

    def sample(self, batch: Batch) -> Tensor:
        self.seer.restart(self.interval, self.warmup, self.cooldown)
        return self.work.draw(self.seer.model, batch)

    def computes(self, step: int) -> bool:
        return computes(step, self.interval, self.warmup, self.cooldown)

    def macs(self) -> float:
        steps = self.work.size.steps
        computed = sum(map(self.computes, range(steps))) / steps
        return computed + (1 - computed) * macs.without_modules(self.work)

    def state_bytes(self) -> int:
        return bytes_in([hook.state_manager._state_cache for hook in self.seer.hooks])

    def forget(self) -> None:
        self.seer.registry.reset_stateful_hooks(recurse=True)


def family(
    order: int, intervals: tuple[int, ...] = (2, 3, 4, 5, 6, 8), compiled: Compiled = "modules", cold: bool = False
) -> Family:
    def opened(work: Workload) -> Mapping[str, Interval]:
        seer = TaylorSeer(work, order, compiled)
        return {f"N={interval}": Interval(seer, work, interval) for interval in intervals}

    how: dict[Compiled, str] = {
        "no": ", eager",
        "modules": "",
        "whole": ", compiled as a whole",
    }
    note = (
        "interval 5, warm-up 3, order 1 by default; factors in float32 as its example has them. Attention and MoE are "
        "named by hand; its hooks can't be traced, so each module is compiled by itself"
    )
    return Family(
        f"TaylorSeer (diffusers), order {order}{how[compiled]}", "peer", note, opened, cold, guarded=compiled == "whole"
    )
