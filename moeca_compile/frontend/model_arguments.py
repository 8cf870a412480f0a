"""What a caller may hand over for a model: the model, what torch.compile gave for it, or a pipeline that holds it."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from moeca_compile import expert_dispatch as canonical
from moeca_compile.engine.intercept import INTERCEPTORS
from moeca_compile.errors import OptionError, StateError
from moeca_compile.expert_dispatch import prepared
from moeca_compile.expert_dispatch.isolate import isolated, share_again
from moeca_compile.frontend.backend import Backend, moeca
from moeca_compile.frontend.calls import Gate
from moeca_compile.frontend.handles import backend_of, states_of
from moeca_compile.frontend.owner import handle_of
from moeca_compile.options import Options
from moeca_compile.runtime.stats import NO_CALL

PARTS = ("transformer", "transformer_2")  # of a pipeline, as diffusers calls them


def parts_of(pipeline: object) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline, by attribute; empty: it is something else."""
    if isinstance(pipeline, (torch.nn.Module, FunctionType)):
        return {}
    found = {name: getattr(pipeline, name, None) for name in PARTS}
    return {name: part for name, part in found.items() if isinstance(part, torch.nn.Module)}


def single_model(given: Any, what: str) -> Any:
    """The model to use: the transformer of a pipeline, where it has one.

    Raises:
        StateError: a pipeline with two.
    """
    parts = parts_of(given)
    if len(parts) > 1:
        name = type(given).__name__
        both = " or ".join(f"{what}(pipe.{part}, ...)" for part in parts)
        raise StateError(f"{what}: {name} has {len(parts)} transformers. Pass one of them: {both}")
    return next(iter(parts.values()), given)


def models_of(given: Any, what: str) -> list[torch.nn.Module]:
    """The models of a module or pipeline.

    Raises:
        StateError: it is neither.
    """
    found = [given] if isinstance(given, torch.nn.Module) else list(parts_of(given).values())
    if not found:
        raise StateError(
            f"{what}: expected a torch.nn.Module, or a pipeline with a `transformer`, and got {type(given).__name__}. "
            'For a function: torch.compile(function, backend="moeca")'
        )
    return found


def compiled_parts(given: Any, what: str) -> list[Any]:
    """What was compiled with moeca: `given` itself, or the transformers of a pipeline.

    Raises:
        StateError: it isn't compiled with moeca.
    """
    found = list(parts_of(given).values()) or [given]
    if not any(_is_ours(one) for one in found):
        raise StateError(
            f"{what}: this {type(given).__name__} isn't compiled with moeca. Pass what "
            'torch.compile(model, backend="moeca") or moeca_compile.compile(model) gave, or the pipeline that it is '
            "set on. Where a compiled function calls the model, pass that function, or prepare the model first"
        )
    return found


def _is_ours(one: Any) -> bool:
    context = handle_of(getattr(one, "__func__", one))
    if context is not None:
        compiler = backend_of(context)
        compiler = getattr(compiler, "compiler_fn", compiler)
        if compiler is moeca or isinstance(compiler, Backend) or states_of(one):
            return True
        home: str = getattr(compiler, "__module__", None) or type(compiler).__module__
        return home.split(".")[0] != "torch"  # a function of the caller's may call ours
    if not isinstance(one, torch.nn.Module):
        return callable(one) and bool(states_of(one))
    return (
        bool(states_of(one))
        or isolated(one)
        or bool(prepared(one))
        or any(handle_of(part) is not None or handle_of(_static_forward(part)) is not None for part in one.modules())
    )


def _static_forward(part: object) -> object:
    """As in `model.forward = torch.compile(model.forward, ...)`."""
    return inspect.getattr_static(part, "forward", None)


def plain_module(model: torch.nn.Module) -> torch.nn.Module:
    """The module that was compiled, however often."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def remove_in_place_compilation(model: torch.nn.Module) -> None:
    """Undo `model.compile()`."""
    model.__dict__.pop("_compiled_call_impl", None)


@contextmanager
def swapped_in(handle: Any, given: Any) -> Iterator[None]:
    """`handle` in the place of what it was compiled from: set on the pipeline, where `given` is one, and with no
    compilation of the model in place in effect."""
    plain, parts = plain_module(handle), parts_of(given)
    held = plain._compiled_call_impl
    remove_in_place_compilation(plain)
    for name in parts:
        setattr(given, name, handle)
    try:
        yield
    finally:
        if held is not None:
            plain._compiled_call_impl = held
        for name, part in parts.items():
            setattr(given, name, part)


def disable(model: Any) -> Any:
    """Give the plain model back, as it was before it was compiled and prepared: its graphs, state and own `forward` go.

    Args:
        model: a model, what `torch.compile` gave for a model or function, or a pipeline. One that isn't compiled is
            returned as it is.

    Returns:
        The plain model; for a pipeline the pipeline, with its plain transformers set.
    """
    parts = parts_of(model)
    for name, part in parts.items():
        plain = disable(part)
        if plain is not part:
            setattr(model, name, plain)
    if isinstance(model, torch.nn.Module):
        model = plain_module(model)
        remove_in_place_compilation(model)
        canonical.unprepare(model)
        share_again(model)
    elif handle_of(model) is not None:
        model = model._torchdynamo_orig_callable
    return model


def inputs_and_options(model: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of `explain`: those that the model takes by name, and options.

    Raises:
        OptionError: one that is neither.
    """
    known = {field.name for field in fields(Options)}
    options = {name: value for name, value in given.items() if name in known}
    inputs = {name: value for name, value in given.items() if name not in known}
    try:
        call = plain_module(model).forward if isinstance(model, torch.nn.Module) else model
        takes = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return inputs, options
    named = {one.name for one in takes if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in takes)
    for name in inputs.keys() - named:
        if not takes_any:
            Options.from_backend_options({name: inputs[name]})  # says which option is near
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near:
            raise OptionError(
                f"unknown option {name!r}, did you mean {near[0]!r}? If the model takes it: keywords={{{name!r}: ...}}"
            )
    return inputs, options


def no_call_warning(found: Sequence[Any]) -> Callable[[], str | None]:
    """For a trajectory's end: what to say if no call came since now."""
    handles = [weakref.ref(one) for one in found]
    before = _marks(found)

    def say() -> str | None:
        if INTERCEPTORS.get():  # who takes the calls
            return None
        alive = [one for handle in handles if (one := handle()) is not None]
        if any(state.uncached for one in alive for state in states_of(one)):  # which was said
            return None
        if len(alive) < len(handles) or _marks(alive) != before:  # calls of a trajectory inside it
            return None
        return f"no call of the compiled model came in this trajectory. {NO_CALL}"

    return say


def _marks(found: Sequence[Any]) -> list[tuple[int, int]]:
    """What a call of one of them changes: Dynamo makes a graph (a first call may do no more), or a step is recorded."""
    contexts = [context for one in found if (context := handle_of(one)) is not None]
    gates = [hook for context in contexts for hook in context.enter_exit_hooks if isinstance(hook, Gate)]
    runtimes = [state.runtime for one in found for state in states_of(one)]
    graphs = [(id(gate), gate.graphs) for gate in gates]
    return graphs + [(id(runtime.latest), len(runtime.latest.last_trajectory())) for runtime in runtimes]
