"""Which of the model's parameters the constants of a graph are made of, and how.

Passes compute constants from weights. Where they only move elements, the bundle keeps a recipe, by which the constant
can be made of other weights. Where they compute, it keeps the names of the parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from moeca_compile.graph import fx
from moeca_compile.graph.fx import aten
from moeca_compile.runtime.bundle.refit.recipes import Expand, Join, Parameter, Permute, Recipe, Reshape, Slice

ORIGINS = "moeca_origins"  # in a graph's meta: an Origin for each of its attributes, by their names


@dataclass(frozen=True)
class Origin:
    """Attributes:
    parameters: the names of those that the constant follows from.
    recipe: the Recipe that it is made of them by; None: they are computed with. A tuple of a node that gives several.
    """

    parameters: frozenset[str] = frozenset()
    recipe: Any = None


def of_parameter(name: str | None, value: Tensor) -> Origin:
    """Of a weight as it is; None: it is no parameter or buffer that people could name."""
    if name is None:
        return Origin()
    return Origin(frozenset((name,)), Parameter(name) if value.is_floating_point() else None)


def origins_of(gm: GraphModule) -> dict[str, Origin]:
    """By the names of the graph's attributes."""
    origins: dict[str, Origin] = gm.meta.setdefault(ORIGINS, {})
    return origins


def of_call(node: Node, origins: Mapping[Node, Origin]) -> Origin:
    """Of what an operator gives whose tensors are all constants."""
    sources = [origins[source] for source in node.all_input_nodes]
    parameters = frozenset().union(*(source.parameters for source in sources))
    return Origin(parameters, _moved(node, origins) if parameters else None)


def _moved(node: Node, origins: Mapping[Node, Origin]) -> Recipe | tuple[Recipe, ...] | None:
    if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
        return _moved_by_function(node, origins)
    form = _FORMS.get(node.target)
    first = node.args[0] if node.args else None
    if form is None or first is None:
        return None
    if isinstance(first, Node):
        recipe = origins[first].recipe
        return None if recipe is None else form(node, recipe)
    recipes = [origins[source].recipe for source in fx.nodes_of(first)]
    return None if None in recipes else form(node, recipes)


def _moved_by_function(node: Node, origins: Mapping[Node, Origin]) -> Recipe | tuple[Recipe, ...] | None:
    """Of a call of a Python function, by the operators that it consists of."""
    sources = node.all_input_nodes

    def run(*tensors: Any) -> Any:
        given = dict(zip(sources, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    examples = [fx.value(source) for source in sources]
    with fx.fake_mode_of(examples):
        inner = make_fx(run)(*examples)
    known = {place: origins[source] for place, source in zip(fx.placeholders(inner), sources, strict=True)}
    for call in inner.graph.nodes:
        if call.op == "call_function":
            known[call] = of_call(call, known) if known.keys() >= set(call.all_input_nodes) else Origin()
    result = fx.output_node(inner).args[0]
    return known[result].recipe if result in known else None  # type: ignore[index]


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _sizes(node: Node) -> tuple[int, ...]:
    return tuple(fx.shape(node))


def _dim(node: Node, place: int, rank: int) -> int:
    dim: int = _argument(node, place, "dim0" if node.target is aten.transpose.int else "dim", 0)
    return dim % rank


def _same(node: Node, recipe: Any) -> Recipe:
    return recipe  # type: ignore[no-any-return]


def _reshape(node: Node, recipe: Any) -> Recipe:
    return Reshape(recipe, _sizes(node))


def _expand(node: Node, recipe: Any) -> Recipe:
    return Expand(recipe, _sizes(node))


def _permute(node: Node, recipe: Any) -> Recipe:
    rank = len(fx.shape(fx.arg(node, 0)))
    dims = list(range(rank))
    if node.target is aten.permute.default:
        dims = [dim % rank for dim in _argument(node, 1, "dims", ())]
    elif node.target is aten.transpose.int:
        a, b = _dim(node, 1, rank), _argument(node, 2, "dim1", 0) % rank
        dims[a], dims[b] = dims[b], dims[a]
    else:
        dims.reverse()
    return Permute(recipe, tuple(dims))


def _slice(node: Node, recipe: Any) -> Recipe:
    source = fx.shape(fx.arg(node, 0))
    dim = _dim(node, 1, len(source))
    start, end = _argument(node, 2, "start", None), _argument(node, 3, "end", None)
    start, end, step = slice(start, end, _argument(node, 4, "step", 1)).indices(source[dim])
    return Slice(recipe, dim, start, end, step)


def _select(node: Node, recipe: Any) -> Recipe:
    source = fx.shape(fx.arg(node, 0))
    dim = _dim(node, 1, len(source))
    index = _argument(node, 2, "index", 0) % source[dim]
    return Reshape(Slice(recipe, dim, index, index + 1), _sizes(node))


def _parts(node: Node, recipe: Any) -> tuple[Recipe, ...]:
    """Of an operator that cuts a tensor into several along a dimension, one after another."""
    source = fx.shape(fx.arg(node, 0))
    is_unbind = node.target is aten.unbind.int
    dim = _dim(node, 1 if is_unbind else 2, len(source))
    recipes, start = list[Recipe](), 0
    for part in fx.value(node):
        end = start + (1 if is_unbind else part.shape[dim])
        recipes.append(Reshape(Slice(recipe, dim, start, end), tuple(part.shape)))
        start = end
    return tuple(recipes)


def _item(node: Node, recipe: Any) -> Recipe:
    return recipe[node.args[1]]  # type: ignore[no-any-return]


def _join(node: Node, recipes: Any) -> Recipe:
    sizes = _sizes(node)
    dim = _dim(node, 1, len(sizes))
    if node.target is aten.stack.default:
        single = (*sizes[:dim], 1, *sizes[dim + 1 :])
        recipes = [Reshape(recipe, single) for recipe in recipes]
    return Join(tuple(recipes), dim)


_FORMS: dict[Any, Callable[[Node, Any], Recipe | tuple[Recipe, ...]]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.expand.default: _expand,
    aten.t.default: _permute,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _parts,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    operator.getitem: _item,
    aten.stack.default: _join,
    aten.cat.default: _join,
}
