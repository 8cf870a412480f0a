"""How a constant of a graph is made of the model's parameters, where elements are only moved.

A runtime gets weights transposed, or the experts of a layer as one tensor. A recipe says so in a few operators, so that
the constant can be made again of other parameters, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

Whole = Annotated[int, Meta(ge=0, le=1 << 40)]
Sizes = Annotated[tuple[Whole, ...], Meta(max_length=64)]


class Parameter(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="parameter"):
    """A parameter of the model, as it is."""

    name: Annotated[str, Meta(max_length=1000)]


class Reshape(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="reshape"):
    of: Recipe
    sizes: Sizes


class Expand(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="expand"):
    """Repeated along dimensions of size 1, and along new ones before the first."""

    of: Recipe
    sizes: Sizes


class Permute(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="permute"):
    of: Recipe
    dims: Sizes


class Slice(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="slice"):
    of: Recipe
    dim: Whole
    start: Whole
    end: Whole
    step: Annotated[int, Meta(ge=1)] = 1


class Join(Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="join"):
    """One after another along a dimension."""

    of: Annotated[tuple[Recipe, ...], Meta(min_length=1, max_length=100_000)]
    dim: Whole


Recipe = Parameter | Reshape | Expand | Permute | Slice | Join


def parameters_of(recipe: Recipe) -> Iterator[str]:
    """The names of the parameters that a recipe takes; one as often as it takes it."""
    if isinstance(recipe, Parameter):
        yield recipe.name
        return
    for part in recipe.of if isinstance(recipe, Join) else (recipe.of,):
        yield from parameters_of(part)


def made_of(recipe: Recipe, arrays: Mapping[str, Any]) -> Any:
    """The constant, made of parameters.

    Args:
        recipe: of the constant.
        arrays: numpy arrays by the name of the parameter.

    Raises:
        ValueError: the arrays' shapes aren't those that the recipe is for.
    """
    match recipe:
        case Parameter(name):
            return arrays[name]
        case Reshape(of, sizes):
            return made_of(of, arrays).reshape(sizes)
        case Expand(of, sizes):
            return np.broadcast_to(made_of(of, arrays), sizes)
        case Permute(of, dims):
            return np.transpose(made_of(of, arrays), dims)
        case Slice(of, dim, start, end, step):
            array = made_of(of, arrays)
            return array[(slice(None),) * dim + (slice(start, end, step),)]
        case Join(parts, dim):
            return np.concatenate([made_of(part, arrays) for part in parts], axis=dim)
