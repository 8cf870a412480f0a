"""Finds the denoisers of a pipeline by structure, never by the name of a class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType

from torch import nn

from moeca_compile.frontend.output_path import LATENTS, TIMESTEPS

PARTS = ("transformer", "transformer_2")  # of a pipeline, as diffusers calls them
BESIDE = "controlnet_cond"  # a ControlNet takes it; it steers the denoiser and isn't one
_DISTRIBUTED = ("DTensor", "DeviceMesh")  # by name: torch.distributed.tensor takes long to import


def parts_of(pipeline: object) -> dict[str, nn.Module]:
    """The modules of a pipeline that it calls at every step, by attribute; empty: the value isn't a pipeline.

    They are `transformer` and `transformer_2`. In their absence they are those of the pipeline's `components` whose
    `forward` takes a latent and a timestep, such as `unet` or `prior`.
    """
    if isinstance(pipeline, (nn.Module, FunctionType, type)):
        return {}
    attributes = {name: getattr(pipeline, name, None) for name in PARTS}
    parts = {name: part for name, part in attributes.items() if isinstance(part, nn.Module)}
    components = getattr(pipeline, "components", None)
    if parts or not isinstance(components, Mapping):
        return parts
    return {name: part for name, part in components.items() if isinstance(part, nn.Module) and _denoises(part)}


def pipeline_in(function: object) -> str:
    """Why a function that torch.compile got isn't cached: it is a pipeline, or a method of one; "": it isn't."""
    compiled = getattr(function, "__wrapped__", function)  # torch puts a function around an object
    pipeline = getattr(compiled, "__self__", compiled)
    parts = " and ".join(parts_of(pipeline))
    if not parts:
        return ""
    return (
        f"torch.compile got a {type(pipeline).__name__}, whose loop is no model. Use moeca_compile.compile(pipeline, "
        f"...), which compiles its {parts}"
    )


def reason_to_leave(function: object, is_full: bool, args: Sequence[object]) -> str:
    """Why a graph runs uncached whatever is in it; "": nothing speaks against caching.

    Args:
        function: what torch.compile got.
        is_full: the graph is the full model.
        args: of the graph.
    """
    if not is_full and (reason := pipeline_in(function)):
        return reason
    if any(type(arg).__name__ in _DISTRIBUTED for arg in args):
        return (
            "its parameters are spread over several ranks (DTensor). granularity='output' caches what the whole model "
            "returns: a step that isn't computed runs none of the model's exchanges"
        )
    return ""


def _denoises(module: nn.Module) -> bool:
    names = set(inspect.signature(module.forward).parameters)
    return BESIDE not in names and not names.isdisjoint(LATENTS) and not names.isdisjoint(TIMESTEPS)
