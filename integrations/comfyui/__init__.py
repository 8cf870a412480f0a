"""A ComfyUI node that compiles the diffusion model with moeca-compile and caches it from step to step.

ComfyUI samples a clone of the model. The node hangs two wrappers on the clone: one around each sampling, which is one
trajectory, and one around each call of the model, in which the compiled model stands in the place of the original. So
the original stays as it is for every other branch of the workflow.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import moeca_compile as moeca

log = logging.getLogger("moeca_compile.comfyui")

KEY = "moeca"
NETWORK = "diffusion_model"  # of ComfyUI's BaseModel
# Entries of transformer_options that are other objects at every step. Dynamo would trace the model anew for them, and
# the wrappers among them are the ones that call the model here.
PER_STEP = frozenset({"sigmas", "sample_sigmas", "uuids", "cond_or_uncond"})


class MoecaCompile:
    """Cache the regions of a diffusion transformer between steps, by a schedule."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "advanced/model"
    DESCRIPTION = (
        "Compiles the diffusion transformer and reuses or forecasts parts of it between steps. Schedules: full, "
        "uniform:3, uniform:3:warmup=4, or the path of a .json file that moeca calibrate wrote."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": ("STRING", {"default": "uniform:2:warmup=4"}),
                "granularity": (["region", "stack", "output"], {"default": "region"}),
                "order": (["auto", "0", "1", "2"], {"default": "auto"}),
                "inner": (["inductor", "eager"], {"default": "inductor"}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, schedule: str, granularity: str, order: str, inner: str) -> bool | str:
        """True, or what is wrong, which ComfyUI shows on the node."""
        try:
            moeca.Options(**_options(schedule, granularity, order, inner)).resolved_schedule()
        except moeca.MoecaError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, model: Any, schedule: str, granularity: str, order: str, inner: str) -> str:
        """Changes when the schedule's file does, so that ComfyUI runs the node again."""
        path = Path(schedule)
        return str(path.stat().st_mtime_ns) if schedule.endswith(".json") and path.exists() else ""

    def apply(self, model: Any, schedule: str, granularity: str, order: str, inner: str) -> tuple[Any]:
        """A clone of the model that samples with the schedule."""
        from comfy.patcher_extension import WrappersMP

        clone = model.clone()
        network = moeca.compile(clone.get_model_object(NETWORK), **_options(schedule, granularity, order, inner))
        for place, wrapper in (
            (WrappersMP.OUTER_SAMPLE, _around_sampling(network)),
            (WrappersMP.APPLY_MODEL, _in_place_of_network(network)),
        ):
            clone.remove_wrappers_with_key(place, KEY)
            clone.add_wrapper_with_key(place, KEY, wrapper)
        return (clone,)


def _options(schedule: str, granularity: str, order: str, inner: str) -> dict[str, Any]:
    forecast = None if order == "auto" else int(order)
    return {"schedule": schedule.strip(), "granularity": granularity, "order": forecast, "inner": inner}


def _around_sampling(network: Any) -> Any:
    """A wrapper that makes one trajectory of each sampling."""

    def sample(executor: Any, *args: Any, **keywords: Any) -> Any:
        with moeca.trajectory(network):
            result = executor(*args, **keywords)
        log.info("%s", moeca.stats(network))
        return result

    return sample


def _in_place_of_network(network: Any) -> Any:
    """A wrapper that puts the compiled network in the original's place during a call."""

    def apply_model(executor: Any, *args: Any, **keywords: Any) -> Any:
        base = executor.class_obj
        original = getattr(base, NETWORK)
        setattr(base, NETWORK, network)
        try:
            return executor(*map(_settled, args), **{name: _settled(value) for name, value in keywords.items()})
        finally:
            setattr(base, NETWORK, original)

    return apply_model


def _settled(argument: Any) -> Any:
    """`transformer_options`, the one dict among the arguments that has them, without what changes at every step."""
    if isinstance(argument, dict) and PER_STEP & argument.keys():
        return {name: value for name, value in argument.items() if name not in PER_STEP}
    return argument


NODE_CLASS_MAPPINGS = {"MoecaCompile": MoecaCompile}
NODE_DISPLAY_NAME_MAPPINGS = {"MoecaCompile": "Moeca: cache between steps"}
