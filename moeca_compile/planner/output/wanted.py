"""What the weights of one seed are fitted to, and the same as arrays for a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeca_compile.planner.output.gram import Gram

GRAMS = ("gram", "own", "fine")


@dataclass
class Wanted:
    """Of one seed: what the fit aims at.

    Attributes:
        states: the wanted latents [N, C, ...] float32 of each step, and the wanted samples.
        gram: of the truth's own outputs and `states`.
        own: of the uncached run's outputs and its latents.
        parts: how many the guidance has.
        is_batched: the guidance takes both halves in one batch.
        fine: of the converged path at every step of the finest run; None: where the steps lie isn't searched.
        fine_timesteps: of these steps.
        rounding: `finfo.eps` of the latents' dtype.
    """

    states: list[torch.Tensor]
    gram: Gram
    own: Gram
    parts: int
    is_batched: bool
    fine: Gram | None = None
    fine_timesteps: tuple[float, ...] = ()
    rounding: float = 0.0


def as_arrays(wanted: Wanted) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that `from_arrays` reads."""
    facts: dict[str, Any] = {
        "parts": wanted.parts, "is_batched": wanted.is_batched, "fine_timesteps": wanted.fine_timesteps,
        "rounding": wanted.rounding,
    }  # fmt: skip
    products = {}
    for name in GRAMS:
        gram: Gram | None = getattr(wanted, name)
        if gram is not None:
            facts[name] = {"names": gram.names, "numbers": gram.numbers}
            products[name] = gram.products
    return {"noted": np.array(json.dumps(facts)), "states": torch.stack(wanted.states).numpy(), **products}


def from_arrays(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Wanted:
    """The same again.

    Raises:
        KeyError, ValueError, TypeError: the arrays are no such ones.
    """
    facts = json.loads(str(arrays["noted"]))
    grams = {}
    for name in GRAMS:
        if name not in facts:
            continue
        names = tuple(tuple(one) for one in facts[name]["names"])
        if arrays[name].shape != (len(names), len(names)):
            raise ValueError(f"{name} has {arrays[name].shape} products of {len(names)} vectors")
        grams[name] = Gram(names, arrays[name], int(facts[name]["numbers"]))
    states = list(torch.from_numpy(arrays["states"]))
    times = tuple(map(float, facts.get("fine_timesteps", ())))
    is_batched, rounding = bool(facts["is_batched"]), float(facts.get("rounding", 0.0))
    parts = int(facts["parts"])
    return Wanted(states, grams["gram"], grams["own"], parts, is_batched, grams.get("fine"), times, rounding)
