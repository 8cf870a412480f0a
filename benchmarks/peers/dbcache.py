"""cache-dit: DBCache with a threshold, with its Taylor calibrator, and its static step masks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers import macs
from benchmarks.peers.way import Family, bytes_in
from benchmarks.peers.workload import Batch, Workload

THRESHOLDS = (0.04, 0.06, 0.08, 0.12, 0.2, 0.3, 0.5)
POLICIES = ("slow", "medium", "fast", "ultra")

Compiled = Literal["no", "blocks", "whole"]


class DBCache:
    """The model under cache-dit. Under "blocks" each block is compiled and cache-dit's own code stays outside.

    taylor: the order of its Taylor calibrator; 0 is none.
    calibrator: "dmd" or "foca" instead.
    config: fields of its `DBCacheConfig`.
    """

    def __init__(self, work: Workload, taylor: int, compiled: Compiled, calibrator: str = "", **config: Any) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported
        import cache_dit
        from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern
        from cache_dit.caching import patch_functors

        self.library, self.config_of = cache_dit, DBCacheConfig
        self.module = work.prepared()
        stacks = [self.module.get_submodule(name) for name in work.stacks]
        if compiled == "blocks":
            for block in itertools.chain(*stacks):
                block.compile()
        adapter = BlockAdapter(
            transformer=self.module,
            blocks=stacks,
            forward_pattern=[ForwardPattern[name] for name in work.stacks.values()],
            patch_functor=getattr(patch_functors, work.functor)() if work.functor else None,
            check_forward_pattern=False,  # it goes by the arguments' names
            has_separate_cfg=False,
        )
        given = {"num_inference_steps": work.size.steps, "enable_separate_cfg": False, **config}
        forecast = _calibrator(calibrator, taylor)
        cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(**given), calibrator_config=forecast)
        self.model = torch.compile(self.module) if compiled == "whole" else self.module

    def restart(self, **config: Any) -> None:
        """Its documented call between requests; only the fields given change."""
        self.library.refresh_context(self.module, cache_config=self.config_of().reset(**config))

    @property
    def contexts(self) -> list[Any]:
        """One a stack, in the order of `Workload.stacks`."""
        return [self.module._context_manager.get_context(name) for name in self.module._context_names]


def _calibrator(name: str, taylor: int) -> Any:
    """What forecasts the residual between full steps; None: it is kept as it was."""
    from cache_dit.caching.cache_contexts.calibrators import (
        DMDCalibratorConfig,
        FoCaCalibratorConfig,
        TaylorSeerCalibratorConfig,
    )

    if name:
        return {"dmd": DMDCalibratorConfig, "foca": FoCaCalibratorConfig}[name]()
    return TaylorSeerCalibratorConfig(taylorseer_order=taylor) if taylor else None


class Setting:
    """`DBCache` at one setting of its knobs."""

    def __init__(self, cache: DBCache, work: Workload, **config: Any) -> None:
        self.cache, self.work, self.config = cache, work, config

    def sample(self, batch: Batch) -> Tensor:
        self.cache.restart(**self.config)
        return self.work.draw(self.cache.model, batch)

    def computed(self) -> int:
        """Full steps of the last trajectory, where there is one stack."""
        (context,) = self.cache.contexts
        return self.work.size.steps - len(context.get_cached_steps())

    def macs(self) -> float:
        """Cached steps as cache-dit counts them; these run the first and the last few blocks."""
        spared = 0.0
        for stack, context in zip(self.work.stacks, self.cache.contexts, strict=True):
            cached = len(context.get_cached_steps()) / self.work.size.steps
            ran = context.cache_config.Fn_compute_blocks + context.cache_config.Bn_compute_blocks
            spared += cached * macs.of_blocks(self.work, stack, but=ran)
        return 1 - spared

    def state_bytes(self) -> int:
        return bytes_in(self.cache.contexts)

    def forget(self) -> None:
        self.cache.restart(**self.config)


def dynamic(
    first: int,
    last: int = 0,
    warmup: int = 8,
    taylor: int = 0,
    thresholds: tuple[float, ...] = THRESHOLDS,
    compiled: Compiled = "blocks",
    cold: bool = False,
) -> Family:
    def opened(work: Workload) -> Mapping[str, Setting]:
        cache = DBCache(
            work, taylor, compiled, Fn_compute_blocks=first, Bn_compute_blocks=last,
            max_warmup_steps=min(warmup, work.size.steps // 4),
        )  # fmt: skip
        return {f"{one:g}": Setting(cache, work, residual_diff_threshold=one) for one in thresholds}

    note = (
        "threshold 0.08, warm-up 8, F8B0 by default for models of many blocks, F1B0 where speed counts. "
        "Its checks can't be traced: each block is compiled by itself, under the recompile limits it recommends"
    )
    how = {"no": ", eager", "blocks": "", "whole": ", compiled as a whole"}[compiled]
    forecast = f" + Taylor {taylor}" if taylor else ""
    return Family(
        f"DBCache F{first}B{last} W{warmup}{forecast}{how}", "peer", note, opened, cold, guarded=compiled == "whole"
    )


def masks(taylor: int = 0) -> Family:
    def opened(work: Workload) -> Mapping[str, Setting]:
        from cache_dit import steps_mask

        by_policy = {policy: steps_mask(total_steps=work.size.steps, mask_policy=policy) for policy in POLICIES}
        cache = DBCache(
            work, taylor, "blocks", Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_policy="static",
            steps_computation_mask=by_policy["slow"],
        )  # fmt: skip
        return {policy: Setting(cache, work, steps_computation_mask=mask) for policy, mask in by_policy.items()}

    note = "its four presets, static; it says that dynamic ones look sharper at equal cost, and that Taylor helps"
    return Family(f"DBCache static mask{f' + Taylor {taylor}' if taylor else ''}", "peer", note, opened)
