"""What is exported: the model captured as one graph, at the batches that the export needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves

from moeca_compile.engine.program import Program
from moeca_compile.errors import CaptureError, LoweringError
from moeca_compile.frontend.arguments import Arguments, tensors, with_tensors
from moeca_compile.frontend.reporting.equal_calls import equal_calls_copied
from moeca_compile.graph import fx
from moeca_compile.graph.capture import Input, inputs_of, isolate_recompiles_kwargs
from moeca_compile.graph.desugar import desugar
from moeca_compile.graph.variant import Variant
from moeca_compile.options import Options
from moeca_compile.pipeline import STANDALONE, Pipeline, build_prologue
from moeca_compile.schedule import Row, Schedule


class Prologue(NamedTuple):
    """A graph of hoisted values.

    Attributes:
        per: "trajectory" or "step", what the values hold for.
        variant: the graph.
        gives: positions of its results in the program's list of hoisted values.
    """

    per: str
    variant: Variant
    gives: tuple[int, ...]


@dataclass(frozen=True)
class Captured:
    """One graph of the model and the arguments it was captured with, by position of its placeholders."""

    program: Program  # runs the schedule in torch
    network: Program  # its variants become the bundle's graphs; the same, unless the model's output is cached
    example: Arguments  # the call
    args: tuple[Any, ...]
    places: dict[str, int]  # by placeholder, for what the caller gave: its place among the tensors of the call
    called: dict[str, str]  # by placeholder, what the model's signature calls it
    parameters: dict[str, str]  # by placeholder, for weights: their name in the model's state dict
    results: tuple[tuple[str, int], ...]  # for each output of the graph, its name and its place in what the model gave

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.network.analysis.facts.inputs

    @property
    def variants(self) -> list[tuple[Row, Variant]]:
        """The bundle's graphs, each with the row that it runs."""
        of_rows = [(row, self.network.variant(row)) for row in self.network.schedule.distinct_rows()]
        return of_rows if self.program is self.network else [(self.program.schedule.rows[0], of_rows[0][1])]

    @cached_property
    def prologues(self) -> list[Prologue]:
        """The graphs of the values that some variant takes from outside: of those that hold for a trajectory, then of
        those that hold for a step."""
        hoisted = self.network.prologues.hoisted
        positions = {position for _, variant in self.variants for position in variant.hoists}
        graphs = list[Prologue]()
        for per, level in (("step", "step"), ("trajectory", "invariant")):
            gives = tuple(sorted(position for position in positions if hoisted[position].level == level))
            if gives:
                name = f"prologue_{per}"
                variant, _ = build_prologue(self.network.analysis, gives, self.network.options, name)
                graphs.insert(0, Prologue(per, variant, gives))
                positions.update(variant.hoists)
        return graphs

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What the model brings itself, by placeholder: parameters, buffers, and tensors that it merely holds."""
        return {
            entry.name: arg for entry, arg in zip(self.inputs, self.args, strict=True) if entry.name not in self.places
        }

    @property
    def names(self) -> dict[str, str]:
        """The names that people see, by placeholder: those of the model's arguments, or where Dynamo found it."""
        names: dict[str, str] = {}
        for entry in self.inputs:
            if entry.name in self.places:
                name = re.sub(r"[\s/\\]+", "_", self.called.get(entry.name, entry.label))
                names[entry.name] = entry.name if name in names.values() else name
        return names


def call(model: Any, arguments: Arguments) -> Any:
    """The model on positional arguments, or on a mapping of keywords."""
    with torch.no_grad():
        return model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)


def call_with(model: Any, captured: Captured, args: Sequence[Any]) -> list[torch.Tensor]:
    """What the model, called as it is, gives for these arguments of its graph, in the order of `captured.results`."""
    places = ((captured.places.get(entry.name), i) for i, entry in enumerate(captured.inputs))
    given = {place: args[i] for place, i in places if place is not None}
    leaves = tree_leaves(call(model, with_tensors(captured.example, given)))
    return [leaves[place] for _, place in captured.results]


def try_call(model: torch.nn.Module, arguments: Arguments) -> None:
    """Call the model as it is: what its first call sets up for later ones (tables, flags) is there for every capture.

    Raises:
        CaptureError: it can't be called so.
    """
    try:
        call(model, arguments)
    except Exception as error:
        described = ", ".join(map(str, arguments)) if isinstance(arguments, Mapping) else f"{len(arguments)} positional"
        raise CaptureError(
            f"{type(model).__name__} can't be called with the example inputs ({described}): "
            f"{type(error).__name__}: {error}"
        ) from error


def capture(
    model: torch.nn.Module, arguments: Arguments, options: Options, pipeline: Pipeline = STANDALONE,
    schedule: Schedule | None = None,
) -> Captured:  # fmt: skip
    """Run a prepared model once through Dynamo. Its `program` is the network's own.

    Args:
        model: prepared.
        arguments: of one call.
        options: of the export.
        pipeline: the passes that make the programs.
        schedule: the options' schedule as it was read before; default: it is read now.

    Raises:
        CaptureError: it isn't one graph, or has nothing to cache.
        LoweringError: its weights aren't on the CPU, an argument isn't a plain tensor, or it exchanges tensors with
            other ranks.
    """
    runs: list[tuple[Any, tuple[Input, ...], tuple[Any, ...], tuple[Any, ...]]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        plain, flatten = desugar(gm, example_inputs)
        inputs = inputs_of(plain, flatten(example_inputs))

        def run(*args: Any) -> Any:
            outputs = _stand_ins(gm) or tuple(gm(*args))
            runs.append((plain, inputs, tuple(flatten(args)), outputs))
            return outputs

        return run

    # the backend is a new object each time: what was compiled before isn't taken again
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, **isolate_recompiles_kwargs())
    try:
        limits = torch._dynamo.config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30)
        with limits, equal_calls_copied(model):
            result = call(compiled, arguments)
    except TorchDynamoException as error:
        text = " ".join(str(error).split("\n")[:4])
        raise CaptureError(f"the model doesn't trace as one graph, which an export needs: {text}") from error
    if len(runs) != 1:
        raise CaptureError(f"the model ran {len(runs)} graphs in one call, an export needs exactly one")
    gm, inputs, args, outputs = runs[0]
    for entry, arg in zip(inputs, args, strict=True):
        if not isinstance(arg, torch.Tensor):
            raise LoweringError(f"{entry.label} reaches the graph as {type(arg).__name__}; pass it as a tensor")
        if arg.device.type != "cpu":
            raise LoweringError(f"{entry.label} is on {arg.device}: move model and inputs to the CPU for the export")
    program = Program(gm, args, inputs, options, schedule, pipeline=pipeline)
    if any(map(fx.is_collective, program.analysis.gm.graph.nodes)):
        raise LoweringError(
            "the model's graph exchanges tensors with other ranks, and what is exported runs by itself: export the "
            "whole model in one process"
        )
    place_of = {id(tensor): place for place, tensor in enumerate(tensors(arguments))}
    names = [entry.name for entry in program.analysis.facts.inputs]
    places = {name: place_of[id(arg)] for name, arg in zip(names, args, strict=True) if id(arg) in place_of}
    by_id = {id(value): name for name, value in bound_arguments(model, arguments).items() if torch.is_tensor(value)}
    called = {name: by_id[id(arg)] for name, arg in zip(names, args, strict=True) if id(arg) in by_id}
    by_id = {id(value): name for name, value in reversed(model.state_dict(keep_vars=True).items())}
    parameters = {name: by_id[id(arg)] for name, arg in zip(names, args, strict=True) if id(arg) in by_id}
    return Captured(program, program, arguments, args, places, called, parameters, _results(result, outputs))


def _stand_ins(gm: torch.fx.GraphModule) -> tuple[torch.Tensor, ...] | None:
    """Tensors of the sizes of the graph's results: a capture looks at which is which, not at values. None: where the
    sizes follow from values, or a result is an input, it must be run."""
    made: dict[torch.fx.Node, torch.Tensor] = {}
    results: Any = fx.output_node(gm).args[0]
    for node in results:
        value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
        if (
            not isinstance(value, torch.Tensor)
            or node.op == "placeholder"
            or any(type(n) is not int for n in value.shape)
        ):
            return None
        made[node] = torch.empty(tuple(value.shape), dtype=value.dtype)
    return tuple(made[node] for node in results)


def _results(result: Any, outputs: Sequence[Any]) -> tuple[tuple[str, int], ...]:
    """Which of the model's results each output of its graph is. What isn't there was handed through, as it came in.

    Raises:
        CaptureError: an output isn't among the results.
    """
    leaves = tree_leaves(result)
    place_of = {id(leaf): place for place, leaf in reversed(list(enumerate(leaves))) if torch.is_tensor(leaf)}
    if any(id(output) not in place_of for output in outputs):
        raise CaptureError("the model computes on what its graph gave; an export needs the graph's outputs as they are")
    places = [place_of[id(output)] for output in outputs]
    if isinstance(result, Mapping) and len(set(places)) == len(places) and all(map(_is_name, result)):
        keys = {id(value): str(key) for key, value in result.items()}
        if all(id(leaves[place]) in keys for place in places):
            return tuple((keys[id(leaves[place])], place) for place in places)
    numbered = ["output"] if len(outputs) == 1 else [f"output_{i:03d}" for i in range(len(outputs))]
    return tuple(zip(numbered, places, strict=True))


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(r"[A-Za-z_]\w*", key) is not None


def numbers(model: torch.nn.Module, arguments: Arguments) -> dict[str, float]:
    """Arguments that are numbers: they become constants of the graph, and the manifest says so."""
    bound = bound_arguments(model, arguments)
    return {k: v for k, v in bound.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def bound_arguments(model: torch.nn.Module, arguments: Arguments) -> dict[str, Any]:
    """The arguments by the names that the model's signature gives them."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        return dict(inspect.signature(model.forward).bind(*arguments).arguments)
    except (TypeError, ValueError):
        return {}
