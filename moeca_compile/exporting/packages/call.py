"""One example call of a model: the leaves of its arguments, and what its result is made of."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moeca_compile.dtypes import DTYPES, name_of
from moeca_compile.engine.packages.model import leaf_name
from moeca_compile.errors import LoweringError, OptionError
from moeca_compile.exporting import request
from moeca_compile.frontend.arguments import Arguments
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.runtime.packages.manifest import TensorLeaf, ValueLeaf

_PLAIN = (type(None), bool, int, float, str)


class ModelCall:
    """A call of the model with example arguments; the model is run once.

    Args:
        module: called as it is.
        example: positional arguments or a mapping of keywords.

    Attributes:
        arguments: the example; its tensors are contiguous, for calls with other strides are copied to that.
        leaves: of the arguments, with the defaults of those that aren't given.
        structure: of these arguments.
        autocast: that is on.
        specs: the leaves as a manifest describes them.
        kind: equal for calls that need no code of their own.
        result_leaves, result_structure: of what the model returned.

    Raises:
        CaptureError: the model can't be called so.
        LoweringError: an argument that is neither a tensor nor a plain value, or a result that isn't made of these.
        OptionError: one tensor as two arguments, or no list of example inputs.
    """

    def __init__(self, module: torch.nn.Module, example: Arguments) -> None:
        if not isinstance(example, (tuple, list, Mapping)):
            raise OptionError(f"other_sizes: expected tuples or mappings of keywords, got {type(example).__name__}")
        self.arguments: Any = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, example)
        request.try_call(module, self.arguments)
        signature = inspect.signature(module.forward)
        named = isinstance(example, Mapping)
        bound = signature.bind(**self.arguments) if named else signature.bind(*self.arguments)
        bound.apply_defaults()
        pairs, self.structure = pytree.tree_flatten_with_path(dict(bound.arguments))
        self.leaves = [leaf for _, leaf in pairs]
        self.specs = [leaf_spec(leaf_name(path), leaf) for path, leaf in pairs]
        tensors = [id(leaf) for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        if len(set(tensors)) < len(tensors):
            raise OptionError("save: one tensor is given as two arguments, so that they would always be one: copy it")
        self.autocast = ambient_autocast()
        self.kind: Hashable = (pytree.treespec_dumps(self.structure), tuple(self.specs))
        result = request.call(module, self.arguments)
        self.result_leaves, self.result_structure = pytree.tree_flatten(result)
        for leaf in self.result_leaves:
            if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
                raise LoweringError(
                    f"save: the model returns a {type(leaf).__name__}, which torch's pytree module can't take apart. "
                    "Let the model return tensors, tuples, lists, dicts, or an output class of diffusers"
                )


def leaf_spec(name: str, leaf: Any) -> TensorLeaf | ValueLeaf:
    """A leaf as a manifest describes it.

    Raises:
        LoweringError: it is neither a tensor nor a plain value, or on another device.
    """
    if isinstance(leaf, torch.Tensor):
        if leaf.device.type != "cpu" or name_of(leaf.dtype) not in DTYPES:
            raise LoweringError(
                f"save: {name} is a {name_of(leaf.dtype)} tensor on {leaf.device}, which no package takes"
            )
        return TensorLeaf(name, name_of(leaf.dtype), tuple(leaf.shape))
    if isinstance(leaf, torch.dtype):
        return ValueLeaf(name, "dtype", name_of(leaf))
    if isinstance(leaf, torch.device):
        return ValueLeaf(name, "device", str(leaf))
    if type(leaf) not in _PLAIN:
        raise LoweringError(f"save: {name} is a {type(leaf).__name__}; a package takes tensors and plain values")
    return ValueLeaf(name, "plain", leaf)


def structure_text(structure: pytree.TreeSpec, what: str) -> str:
    """A structure as a manifest holds it.

    Raises:
        LoweringError: it has a type that can't be written down.
    """
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, TypeError) as error:
        raise LoweringError(f"save: the structure of {what} can't be written down: {error}") from error


def modules_of(structure: pytree.TreeSpec) -> set[str]:
    """Python modules with the types of a structure, but for Python's and torch's own."""
    names = set[str]()
    if structure.type is not None:
        for kind in (structure.type, structure.context):
            name = getattr(kind, "__module__", "") if isinstance(kind, type) else ""
            names |= {name} if name.partition(".")[0] not in ("", "builtins", "collections", "torch") else set()
    for child in structure.children():
        names |= modules_of(child)
    return names
