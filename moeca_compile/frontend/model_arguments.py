"""Resolves the `model` argument of the public functions: a model, a compiled model, or a pipeline that holds one."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from moeca_compile import expert_dispatch
from moeca_compile.engine.intercept import INTERCEPTORS
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.errors import OptionError, StateError
from moeca_compile.expert_dispatch import prepared
from moeca_compile.expert_dispatch.isolate import isolated, share_again
from moeca_compile.frontend.backend import Backend, moeca
from moeca_compile.frontend.calls import Gate
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.handles import backend_of, runs_of, states_of
from moeca_compile.frontend.owner import handle_of
from moeca_compile.options import Options
from moeca_compile.runtime.stats import NO_CALL


def single_model(model: Any, what: str) -> Any:
    """The model itself, the transformer of a pipeline, or the only model of a list.

    Args:
        model: a model or pipeline, or a list with one of them.
        what: name of the public function, for the message.

    Raises:
        StateError: a pipeline with two transformers, a list with several models, or a loaded package.
    """
    if isinstance(model, (list, tuple)) and len(model) == 1:
        return single_model(model[0], what)
    parts = parts_of(model)
    if len(parts) > 1:
        name = type(model).__name__
        both = " or ".join(f"{what}(pipe.{part}, ...)" for part in parts)
        raise StateError(f"{what}: {name} has {len(parts)} transformers. Pass one of them: {both}")
    if isinstance(model, (list, tuple)):
        raise StateError(
            f"{what}: expected one model, and got {len(model)} in a {type(model).__name__}. Pass one of them: "
            f"{what}(models[0], ...)"
        )
    part = next(iter(parts.values()), model)
    _refuse_loaded(part, what)
    return part


def _refuse_loaded(model: Any, what: str) -> None:
    if isinstance(model, LoadedModel):
        raise StateError(
            f"{what}: this {type(model).__name__} is native code out of a package, without graph and plain model. "
            "Pass the model that it was saved from"
        )


def models_of(model: Any, what: str) -> list[torch.nn.Module]:
    """The module itself, or the transformers of a pipeline.

    Args:
        model: a module or pipeline, or a list of modules that share trajectories.
        what: name of the public function, for the message.

    Raises:
        StateError: neither a module nor a pipeline with a transformer, one module twice, or a loaded package.
    """
    if isinstance(model, (list, tuple)):
        models = [part for parts in model for part in models_of(parts, what)]
        if len({id(plain_module(part)) for part in models}) < len(models):
            raise StateError(f"{what}: one model is given twice. Models that are compiled together are different ones")
    else:
        models = [model] if isinstance(model, torch.nn.Module) else list(parts_of(model).values())
    for part in models:
        _refuse_loaded(part, what)
    if not models:
        raise StateError(
            f"{what}: expected a torch.nn.Module, or a pipeline with a `transformer`, and got {type(model).__name__}"
            f"{_components(model)}. For a function: torch.compile(function, backend='moeca')"
        )
    return models


def _components(pipeline: object) -> str:
    """For a message: the components of a pipeline, none of which takes a latent and a timestep."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        return ""
    return f", none of whose components takes a latent and a timestep: {', '.join(map(str, components)) or 'none'}"


def compiled_parts(model: Any, what: str) -> list[Any]:
    """The compiled model itself, or the transformers of a pipeline.

    Args:
        model: a compiled model, a compiled function, a pipeline, or a list of compiled models.
        what: name of the public function, for the message.

    Raises:
        StateError: nothing of it is compiled with moeca.
    """
    parts = list(model) if isinstance(model, (list, tuple)) else list(parts_of(model).values()) or [model]
    if not any(map(is_compiled_here, parts)):
        raise StateError(
            f"{what}: this {type(model).__name__} isn't compiled with moeca. Pass what "
            'torch.compile(model, backend="moeca") or moeca_compile.compile(model) gave, or the pipeline that it is '
            "set on. Where a compiled function calls the model, pass that function, or prepare the model first"
        )
    return parts


def is_compiled_here(model: Any) -> bool:
    """Whether a model or function is compiled with this backend, or may call what is."""
    if isinstance(model, LoadedModel):
        return True
    context = handle_of(getattr(model, "__func__", model))
    if context is not None:
        compiler = backend_of(context)
        compiler = getattr(compiler, "compiler_fn", compiler)
        if compiler is moeca or isinstance(compiler, Backend) or states_of(model):
            return True
        module_name: str = getattr(compiler, "__module__", None) or type(compiler).__module__
        return module_name.split(".")[0] != "torch"  # a backend of the caller's may call this one
    if not isinstance(model, torch.nn.Module):
        return callable(model) and bool(states_of(model))
    if states_of(model) or isolated(model) or prepared(model):
        return True
    return any(handle_of(part) is not None or handle_of(_static_forward(part)) is not None for part in model.modules())


def _static_forward(part: object) -> object:
    """The forward of a module without binding it, as in `model.forward = torch.compile(model.forward, ...)`."""
    return inspect.getattr_static(part, "forward", None)


def plain_module(model: torch.nn.Module) -> torch.nn.Module:
    """The original module of a compiled one, even if it was compiled several times."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def remove_in_place_compilation(model: torch.nn.Module) -> None:
    """Undo `model.compile()`."""
    model.__dict__.pop("_compiled_call_impl", None)


@contextmanager
def swapped_in(handles: Sequence[Any], model: Any) -> Iterator[None]:
    """Use handles in place of the models that they were compiled from, inside a `with` block.

    Args:
        handles: the compiled modules.
        model: what the caller passed: the model or models, whose compilation in place is suspended; or a pipeline, on
            which the handles are set.
    """
    plain_modules, parts = [plain_module(handle) for handle in handles], parts_of(model)
    in_place = [plain._compiled_call_impl for plain in plain_modules]
    for plain in plain_modules:
        remove_in_place_compilation(plain)
    for name, handle in zip(parts, handles, strict=False):
        setattr(model, name, handle)
    try:
        yield
    finally:
        for plain, compiled_call in zip(plain_modules, in_place, strict=True):
            if compiled_call is not None:
                plain._compiled_call_impl = compiled_call
        for name, part in parts.items():
            setattr(model, name, part)


def disable(model: Any) -> Any:
    """Return the plain model, as it was before it was compiled and prepared. Its graphs and state are dropped.

    Args:
        model: a model, what `torch.compile` returned for a model or function, a pipeline, or a list of models. A model
            that isn't compiled is returned as it is.

    Returns:
        The plain model; for a pipeline the pipeline, with its plain transformers set; for a list a list.

    Raises:
        StateError: a loaded package, which has no plain model.
    """
    _refuse_loaded(model, "disable")
    if isinstance(model, (list, tuple)):
        return type(model)(map(disable, model))
    parts = parts_of(model)
    for name, part in parts.items():
        plain = disable(part)
        if plain is not part:
            setattr(model, name, plain)
    if isinstance(model, torch.nn.Module):
        model = plain_module(model)
        remove_in_place_compilation(model)
        expert_dispatch.unprepare(model)
        share_again(model)
    elif handle_of(model) is not None:
        model = model._torchdynamo_orig_callable
    return model


def inputs_and_options(model: Any, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keywords of `explain`.

    Returns:
        The inputs that the model takes by name, and the options.

    Raises:
        OptionError: a keyword that is neither.
    """
    option_names = {field.name for field in fields(Options)}
    options = {name: value for name, value in keywords.items() if name in option_names}
    inputs = {name: value for name, value in keywords.items() if name not in option_names}
    try:
        call = plain_module(model).forward if isinstance(model, torch.nn.Module) else model
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return inputs, options
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    input_names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    for name in inputs.keys() - input_names:
        if not takes_any:
            Options.from_backend_options({name: inputs[name]})  # raises, and names a similar option
        near = difflib.get_close_matches(name, option_names, n=1, cutoff=0.8)
        if near:
            raise OptionError(
                f"unknown option {name!r}, did you mean {near[0]!r}? If the model takes it: keywords={{{name!r}: ...}}"
            )
    return inputs, options


def no_call_warning(handles: Sequence[Any]) -> Callable[[], str | None]:
    """A function for the end of a trajectory: it returns the warning that no handle was called since now, or None."""
    refs = [weakref.ref(handle) for handle in handles]
    before = _call_counts(handles)

    def warning() -> str | None:
        if INTERCEPTORS.get():  # calls go to other code
            return None
        alive = [handle for ref in refs if (handle := ref()) is not None]
        if any(state.uncached for handle in alive for state in states_of(handle)):  # there was a warning already
            return None
        if len(alive) < len(refs) or _call_counts(alive) != before:  # an inner trajectory had calls
            return None
        return f"no call of the compiled model came in this trajectory. {NO_CALL}"

    return warning


def _call_counts(handles: Sequence[Any]) -> list[tuple[int, int]]:
    """Counts that a call of a handle changes: of Dynamo's graphs (a first call may do no more), and of records."""
    contexts = [context for handle in handles if (context := handle_of(handle)) is not None]
    gates = [hook for context in contexts for hook in context.enter_exit_hooks if isinstance(hook, Gate)]
    runtimes = [run.runtime for handle in handles for run in runs_of(handle)]
    graphs = [(id(gate), gate.graphs) for gate in gates]
    latest = [runtime.trajectories.latest for runtime in runtimes]
    return graphs + [(id(running), len(running.last_trajectory())) for running in latest]
