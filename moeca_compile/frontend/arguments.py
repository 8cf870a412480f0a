"""The arguments of one call of a model, positional or by keyword, and the same call with another batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from moeca_compile.errors import LoweringError

Arguments = Sequence[Any] | Mapping[str, Any]


def tensors(arguments: Arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def with_tensors(arguments: Arguments, given: Mapping[int, torch.Tensor]) -> Any:
    """The call with other tensors, by their place in `tensors`."""
    places = itertools.count()
    return tree_map_only(torch.Tensor, lambda one: given.get(next(places), one), arguments)


def batch_of(arguments: Arguments) -> int:
    """The size of the first dimension of the example's tensor with the most dimensions.

    Raises:
        LoweringError: no tensor has a dimension.
    """
    found = max(tensors(arguments), key=lambda one: one.dim(), default=None)
    if found is None or not found.dim() or not found.shape[0]:
        raise LoweringError("example_inputs: no tensor with a batch; give what one call of the model gets")
    return found.shape[0]


def rebatched(arguments: Arguments, batch: int) -> Any:
    """The example with another batch: the samples of every tensor that has the example's batch, taken in turn."""
    example_batch = batch_of(arguments)

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != example_batch:
            return tensor
        return tensor[torch.arange(batch, device=tensor.device) % example_batch]

    return tree_map_only(torch.Tensor, take, arguments)
