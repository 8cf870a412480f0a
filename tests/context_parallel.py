"""A tiny Flux under diffusers' context parallelism, plain and cached: what one of two ranks gets."""

from __future__ import annotations

from typing import Any

import torch

import moeca_compile as moeca
from moeca_compile.engine.program import Program
from moeca_compile.frontend.handles import states_of
from moeca_compile.graph import fx


def flux_of_ranks() -> dict[str, Any]:
    """Six steps: outputs of the whole model and of the split one, and what the split one's variants exchange.

    Both follow the schedule of the whole one.
    """
    from diffusers import ContextParallelConfig

    from tests.real.zoo import flux, flux_inputs

    torch.accelerator.device_count = lambda: 1  # a CPU has 0, by which diffusers divides the rank

    def outputs(model: Any) -> list[list[float]]:
        with torch.no_grad():
            return [model(**flux_inputs(step), return_dict=False)[0].flatten().tolist() for step in range(6)]

    whole, split = flux(), flux()
    split.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    result: dict[str, Any] = {"whole": outputs(whole), "plain": outputs(split)}
    handle = moeca.compile(whole, schedule="uniform:3", inner="eager")
    result["whole cached"] = outputs(handle)
    result["whole_state_bytes"] = moeca.stats(handle).state_bytes
    for name, schedule in (("full", "full"), ("uniform:3", program_of(handle).schedule)):
        handle = moeca.compile(split, schedule=schedule, inner="eager")
        result[name] = outputs(handle)
    program = program_of(handle)
    variants = [program.variant(row) for row in program.schedule.distinct_rows()]
    result["collectives"] = {variant.name: exchanges(variant.gm) for variant in variants}
    result["state_bytes"] = moeca.stats(handle).state_bytes
    return result


def program_of(handle: Any) -> Program:
    (program,) = (program for state in states_of(handle) for program in state.runtime.programs.values())
    return program


def exchanges(gm: torch.fx.GraphModule) -> int:
    """The number of a graph's collectives; waiting for one isn't one."""
    return sum(fx.is_collective(node) and "wait" not in str(node.target) for node in gm.graph.nodes)
