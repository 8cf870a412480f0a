"""Where the samples of a tensor lie, and tensors of several requests as those of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moeca_compile.errors import StateError


class Samples(NamedTuple):
    """Where the samples of a tensor lie.

    Attributes:
        axis: along which they lie; None: the tensor doesn't depend on the batch.
        size: of one sample along this axis.
    """

    axis: int | None
    size: int = 0

    def part(self, tensor: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """The samples from `first` on: a view, and contiguous where `tensor` is and the axis is the first."""
        if self.axis is None:
            return tensor
        return tensor.narrow(self.axis, first * self.size, count * self.size)

    def joined(self, parts: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
        """The samples of these tensors, one after another in a new tensor, and `padding` copies of the last one."""
        if self.axis is None:
            return parts[0]
        count = parts[-1].shape[self.axis] // self.size
        return torch.cat([*parts, *[self.part(parts[-1], count - 1, 1)] * padding], self.axis)


def samples_of(shapes: Mapping[int, Sequence[int]], what: str) -> Samples:
    """Find the samples of a tensor by its shapes.

    Args:
        shapes: by batch, among them that of one sample.
        what: names the tensor in the message.

    Raises:
        StateError: several sizes depend on the batch, or one isn't a multiple of it.
    """
    one = tuple(shapes[1])
    if len(shapes) == 1:  # calls have one sample, so a tensor is a sample
        return Samples(0, one[0]) if one else Samples(None)
    found = Samples(None)
    for batch, shape in shapes.items():
        axes = [axis for axis, size in enumerate(shape) if size != one[axis]] if len(shape) == len(one) else [-1, -1]
        if len(axes) > 1 or (axes and one[axes[0]] * batch != shape[axes[0]]):
            raise StateError(
                f"{what} is {list(one)} for one sample and {list(shape)} for {batch}, which can't be cut into samples: "
                "requests can't share a call of this model"
            )
        if axes:
            found = Samples(axes[0], one[axes[0]])
    return found
