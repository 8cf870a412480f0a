"""What requests give and get: the model's arguments and results, for several requests in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from moeca_compile.engine.batched.samples import Samples, samples_of
from moeca_compile.errors import StateError
from moeca_compile.frontend.arguments import Arguments, batch_of, rebatched


class Inputs:
    """The arguments of calls like an example.

    Args:
        example: arguments of one call, positional or by keyword.

    Attributes:
        shared: positions of the leaves that hold for all samples of a call.

    Raises:
        LoweringError: no tensor has a batch.
    """

    def __init__(self, example: Arguments) -> None:
        batch = batch_of(example)
        self._example = dict(example) if isinstance(example, Mapping) else tuple(example)
        by_path, self._spec = tree_flatten_with_path(rebatched(self._example, 1))
        self._names = [keystr(path) for path, _ in by_path]
        self._leaves = [leaf for _, leaf in by_path]
        given = tree_flatten(self._example)[0]
        self._has_batch = [isinstance(x, torch.Tensor) and bool(x.dim()) and x.shape[0] == batch for x in given]
        self.shared = tuple(i for i, has_batch in enumerate(self._has_batch) if not has_batch)

    @property
    def bytes(self) -> int:
        """Of the tensors of one sample."""
        return sum(leaf.nbytes for leaf in self._leaves if isinstance(leaf, torch.Tensor))

    def admit(self, inputs: Any) -> tuple[list[Any], int]:
        """The leaves of a request's arguments, and its number of samples.

        Raises:
            StateError: they aren't like the example.
        """
        if isinstance(inputs, Mapping) and isinstance(self._example, dict) and inputs.keys() == self._example.keys():
            inputs = {key: inputs[key] for key in self._example}
        leaves, spec = tree_flatten(tuple(inputs) if isinstance(inputs, list) else inputs)
        if spec != self._spec:
            raise StateError(
                f"the inputs of a step have another form than the example ({', '.join(self._names)}): yield a tuple, "
                "or a mapping of keywords, like it"
            )
        batches = set()
        for name, leaf, known, has_batch in zip(self._names, leaves, self._leaves, self._has_batch, strict=True):
            if not isinstance(known, torch.Tensor):
                if leaf is not known and leaf != known:
                    raise StateError(f"{name} is {leaf!r}, and {known!r} in the example: open another batched model")
                continue
            if _kind(leaf, has_batch) != _kind(known, has_batch):
                raise StateError(f"{name} is {_kind(leaf, has_batch)}, and {_kind(known, has_batch)} in the example")
            if has_batch:
                batches.add(leaf.shape[0])
        if len(batches) > 1 or 0 in batches:
            raise StateError(f"the inputs of a step have batches {sorted(batches)}: give each the same, from 1 on")
        return leaves, batches.pop()

    def joined(self, requests: Sequence[Sequence[Any]], padding: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of one call for several requests, with copies of the last sample."""
        values = []
        for i, has_batch in enumerate(self._has_batch):
            parts = [leaves[i] for leaves in requests]
            values.append(Samples(0, 1).joined(parts, padding) if has_batch else parts[0])
        return self.arguments(values)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with these leaves."""
        arguments = tree_unflatten(leaves, self._spec)
        return ((), arguments) if isinstance(arguments, dict) else (arguments, {})

    def sample(self, leaves: Sequence[Any], number: int) -> list[Any]:
        """The leaves of one sample of a call."""
        pairs = zip(leaves, self._has_batch, strict=True)
        return [leaf[number : number + 1] if has_batch else leaf for leaf, has_batch in pairs]

    def varied(self, batch: int) -> list[Any]:
        """Leaves of a call of several samples that differ: those of the example in turn, floating ones scaled."""
        leaves = tree_flatten(rebatched(self._example, batch))[0]
        for i, has_batch in enumerate(self._has_batch):
            if has_batch and leaves[i].is_floating_point():
                scale = 1 + torch.arange(batch, device=leaves[i].device) / 16
                leaves[i] = leaves[i] * scale.to(leaves[i].dtype).reshape(-1, *[1] * (leaves[i].dim() - 1))
        return leaves


class Results:
    """What the model returns, cut into the results of requests.

    Args:
        results: of calls, by batch, among them 1.

    Raises:
        StateError: they can't be cut into samples.
    """

    def __init__(self, results: Mapping[int, Any]) -> None:
        flat: dict[int, tuple[list[Any], TreeSpec]] = {batch: tree_flatten(result) for batch, result in results.items()}
        self._samples = []
        for i, leaf in enumerate(flat[1][0]):
            samples = Samples(None)
            if isinstance(leaf, torch.Tensor):
                samples = samples_of({batch: leaves[i].shape for batch, (leaves, _) in flat.items()}, "a result")
                if samples.axis is None:
                    raise StateError("a result doesn't depend on the batch: requests can't share a call of this model")
            self._samples.append(samples)

    def split(self, result: Any, batches: Sequence[int]) -> list[Any]:
        """A result for each request."""
        leaves, spec = tree_flatten(result)
        split, first = [], 0
        for batch in batches:
            parts = [
                samples.part(leaf, first, batch) if isinstance(leaf, torch.Tensor) else leaf
                for leaf, samples in zip(leaves, self._samples, strict=True)
            ]
            split.append(tree_unflatten(parts, spec))
            first += batch
        return split


def _kind(leaf: Any, has_batch: bool) -> str:
    """For comparing and telling."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    shape = ["batch", *leaf.shape[1:]] if has_batch and leaf.dim() else [*leaf.shape]
    return f"{str(leaf.dtype).removeprefix('torch.')} {shape} on {leaf.device}"
