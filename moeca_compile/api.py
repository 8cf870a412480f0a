"""The public functions: compile, prepare, warmup, trajectory, reset, stats, explain.

`frontend/model_arguments.py` resolves the `model` argument of each function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._dynamo.eval_frame import OptimizedModule

from moeca_compile import backend, expert_dispatch
from moeca_compile.engine.frozen import install_fast_path
from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.intercept import Interceptor, intercepting
from moeca_compile.engine.packages import LoadedModel
from moeca_compile.engine.program import Program
from moeca_compile.engine.trajectories.statistics import stats_of
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import CaptureError, OptionError, StateError
from moeca_compile.expert_dispatch import PrepareReport
from moeca_compile.expert_dispatch.isolate import share_again
from moeca_compile.frontend.denoisers import parts_of
from moeca_compile.frontend.entry import Entry
from moeca_compile.frontend.handles import HandleState, runs_of, states_of
from moeca_compile.frontend.methods import compile_module, prepare_module
from moeca_compile.frontend.model_arguments import (
    compiled_parts,
    inputs_and_options,
    models_of,
    no_call_warning,
    plain_module,
    remove_in_place_compilation,
    single_model,
)
from moeca_compile.frontend.output_path import OutputEntry
from moeca_compile.frontend.owner import handle_of, modules_of, parameters_of
from moeca_compile.frontend.reporting.calls import with_calls
from moeca_compile.frontend.reporting.dry_run import is_dry, traced_dry
from moeca_compile.frontend.reporting.last_call import report_of_last_call
from moeca_compile.frontend.reporting.recorder import GraphRecorder
from moeca_compile.frontend.summary import report_of
from moeca_compile.inspect.report import Report
from moeca_compile.lowering.inductor.ahead import ask_compiler, compiles_on_cpu
from moeca_compile.options import Options
from moeca_compile.runtime.stats import Stats
from moeca_compile.schedule import Schedule
from moeca_compile.schedule.granularity import OUTPUT

Model = TypeVar("Model")


def prepare(model: Any) -> PrepareReport:
    """Replace each expert dispatch of the model by one traceable operator, in place.

    Eager results and `state_dict` stay as they are. `torch.compile(model, backend="moeca")` prepares the model on its
    first call. Call `prepare` yourself for `fullgraph=True`, and for a compiled function that closes over a model.

    Args:
        model: a module, what `torch.compile` returned for one, or a pipeline with a `transformer`.

    Returns:
        The modules that were changed, and the dispatches that were left alone, each with its reason. For a pipeline,
        one report of all its transformers.

    Raises:
        StateError: neither a module nor a pipeline with a `transformer`; or weights that `free_hoisted` dropped.
    """
    reports = [prepare_module(plain_module(part)) for part in models_of(model, "prepare")]
    if len(reports) == 1:
        return reports[0]
    merged = {}
    for field in fields(PrepareReport):
        merged[field.name] = tuple(entry for report in reports for entry in getattr(report, field.name))
    return PrepareReport(**merged)


def unprepare(model: Any) -> None:
    """Put the model's own expert dispatches back, as they were before `prepare`.

    Args:
        model: as for `prepare`.

    Raises:
        StateError: neither a module nor a pipeline with a `transformer`.
    """
    for part in models_of(model, "unprepare"):
        module = plain_module(part)
        expert_dispatch.unprepare(module)
        share_again(module)


def compile(
    model: Model,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    **options: Any,
) -> Model:
    """Prepare a model and compile it with `torch.compile(model, backend="moeca")`.

    A pipeline's transformers (`transformer`, `transformer_2`) are compiled and set on the pipeline. Two transformers,
    and models that are given as a list, run one trajectory: its steps count over both, so one schedule places the
    computed steps of the whole loop. The first step of the second model is computed in full, unless `hand_over` is set;
    what the first one kept is released then.

    A model that is compiled already, by `torch.compile` or in place, is compiled anew; the last compilation counts.
    Methods that call the model's `forward`, such as `forward_with_cfg`, run compiled too. The package's own compiling
    happens at the first call, or in `warmup`.

    Args:
        model: a module in `eval()` mode, a pipeline with a `transformer`, or a list of modules that one sampling loop
            calls in turn (one for each range of timesteps).
        fullgraph: handed to `torch.compile`: a graph break is an error.
        dynamic: handed to `torch.compile`. True: sizes will change, and a variant is compiled once for all of them.
        mode: `torch.compile`'s mode, handed to Inductor.
        **options: the fields of `Options`, such as `schedule="uniform:3"`.

    Returns:
        The compiled model, which is called as the model is. For a pipeline the pipeline itself, for a list a list.

    Raises:
        OptionError: an unknown option, or a value that it doesn't take. Raised here, not at the first call.
        ScheduleError: a schedule that can't be read.
        StateError: neither a module nor a pipeline with a `transformer`; or a list with one model twice.
    """
    parsed = Options.from_backend_options(options, mode)
    modules = [plain_module(part) for part in models_of(model, "compile")]
    compiler = backend.Backend(parsed, together=len(modules) > 1)
    if parsed.inner == "inductor" and any(compiles_on_cpu(module.parameters()) for module in modules):
        ask_compiler()
    for module in modules:
        remove_in_place_compilation(module)
    handles: list[Any] = [compile_module(module, compiler, fullgraph, dynamic) for module in modules]
    parts = parts_of(model)
    for name, handle in zip(parts, handles, strict=False):
        setattr(model, name, handle)
    if isinstance(model, (list, tuple)):
        return type(model)(handles)
    return model if parts else handles[0]


def warmup(model: Any, *inputs: Any, **keywords: Any) -> Any:
    """Capture the model and compile every variant now, for inputs like these, and not during the first image.

    No state is kept: the next call starts a trajectory.

    Args:
        model: the compiled model, a pipeline, or a list of compiled models. Of several models, each is warmed up with
            the same inputs.
        *inputs: inputs of one call, as the model takes them. Their shapes and dtypes count, their values don't.
        **keywords: inputs that the model takes by name.

    Returns:
        The model's output for these inputs, everything computed; of several models a list.

    Raises:
        StateError: the model isn't compiled with moeca.
    """
    several = list(model) if isinstance(model, (list, tuple)) else list(parts_of(model).values())
    if len(several) > 1:
        return [warmup(part, *inputs, **keywords) for part in several]
    model = single_model(model, "warmup")

    def warm(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        try:
            program, args = entry.place(args, runtime)
        except CaptureError as error:
            return entry.run_uncached(args, str(error))
        with runtime.packs.active() if program.packs_experts else nullcontext():
            return program.compiled_schedule.warm(args)

    with torch.no_grad():
        result, intercepted = _intercept(model, inputs, keywords, warm)
    if not intercepted and not any(state.parts for state in states_of(model)):
        raise StateError('warmup: nothing was compiled. Is this torch.compile(model, backend="moeca")?')
    return result


def trajectory(
    model: Any,
    steps: int | None = None,
    stream: str | None = None,
    *,
    timesteps: Sequence[float] = (),
    frozen: bool = False,
) -> Trajectory:
    """Say where a trajectory begins and ends: `with moeca_compile.trajectory(model, steps=50): ...`.

    A trajectory begins cold and owns its state; no state of another trajectory is used in it. With `stream`, each call
    of the model is exactly one step, and no input is read on the host: open one trajectory for each guidance stream,
    and enter it around each call of that stream. Entering the same object again continues it.

    Args:
        model: the compiled model, a compiled function, a pipeline (all its transformers), or a list of compiled models.
        steps: how many calls of one stream are expected; one more is refused. None: any number.
        stream: a name, for samplers that call the model several times a step (guidance in two calls, Heun).
        timesteps: the timesteps of the calls, as the model receives them, one a step. Values that depend on the
            timestep alone are then computed for all steps at once. Without `timesteps` this happens from the second
            trajectory on, if its timesteps are those of the first. A call with another timestep computes its own
            values. In a named stream on an accelerator, timesteps aren't read on the host: the device compares
            them, and a difference is an error when the block is left.
        frozen: you guarantee that no weight, attribute, hook or submodule of the model changes until the last exit.
            This isn't checked. From the second call of a kind (shapes, dtypes, other arguments) on, Dynamo's guards
            are skipped; for a model of many weights the guards take longer than a reused step.

    Returns:
        A context manager.

    Raises:
        StateError: `steps` below one; a model that isn't compiled with moeca; `frozen` with something else than a
            compiled module. On leaving the block: other timesteps came than were declared.
    """
    if frozen:
        model = single_model(model, "trajectory")
        install_fast_path(model)
    handles = compiled_parts(model, "trajectory")
    owned = [id(part) for handle in handles for part in (*parameters_of(handle), *modules_of(handle))]
    context = Trajectory(owned, steps, stream, timesteps, model if frozen else None)
    context.if_empty = no_call_warning(handles)
    return context


def reset(model: Any) -> None:
    """Drop all cached state of this model, so that the next call starts cold. Compiled variants stay.

    Args:
        model: the compiled model, a pipeline, or a list of compiled models.

    Raises:
        StateError: the model isn't compiled with moeca.
    """
    for run in _runs(model, "reset"):
        run.runtime.reset()


def stats(model: Any) -> Stats:
    """Report what ran since the last `reset`, and what is held now.

    Args:
        model: the compiled model, a pipeline, or a list of compiled models. Models that were compiled together have one
            trajectory, which is reported for any of them.

    Returns:
        One record for each call, milliseconds without compiling, the speedup against computed steps, the share of the
        MACs, bytes of state, and warnings. It prints as a table of the last trajectory's steps, and a line for each
        earlier trajectory.

    Raises:
        StateError: the model isn't compiled with moeca.
    """
    return stats_of(_runs(model, "stats"))


def _runs(model: Any, what: str) -> list[HandleState | LoadedModel]:
    """What holds the trajectories of all handles of the model. `what`: the public function, for the message."""
    return list(dict.fromkeys(run for handle in compiled_parts(model, what) for run in runs_of(handle)))


def explain(
    model: Any,
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    schedule: Schedule | str | Path | None = None,
    html: str | Path | None = None,
    **named: Any,
) -> Report:
    """Capture the model for these inputs and report what was found and what would be built. Nothing is compiled.

    Without inputs and options, the last call of a compiled model is explained. A model that is compiled with moeca is
    explained with its own options, unless others are given. Its cached state isn't touched.

    Args:
        model: a module, a compiled model, or a pipeline with one transformer. A plain module is prepared in place.
        *inputs: inputs of one call, as the model takes them.
        keywords: inputs by name that are named like options.
        schedule: the schedule to explain, as in `Options`.
        html: a file to write the report to as one page, with the graphs of all passes (`Report.to_html` adds images
            and what a calibration measured). After a trajectory, explain the compiled model: the page then shows the
            milliseconds of each step.
        **named: inputs that the model takes by name, and fields of `Options`.

    Returns:
        Regions, rejected candidates with their reasons, passes and variants. It prints as a table.

    Raises:
        CaptureError: there is nothing to cache, or the graph can't be captured.
        StateError: no inputs, and no call that could be explained; or a pipeline with two transformers.
        OptionError: a keyword that is neither an option nor an input of the model.
        ScheduleError: a schedule that can't be read, or doesn't fit the model.
        UserError: the page can't be written.
    """
    with GraphRecorder(html is not None) as recorder:
        report = recorder.add_to(_explained(model, inputs, keywords, schedule, named, recorder))
    if html is not None:
        report.to_html(html)
    return report


def _explained(
    model: Any, inputs: Sequence[Any], keywords: Mapping[str, Any] | None, schedule: Schedule | str | Path | None,
    named: Mapping[str, Any], recorder: GraphRecorder,
) -> Report:  # fmt: skip
    model = single_model(model, "explain")
    named_inputs, overrides = inputs_and_options(model, named)
    if schedule is not None:
        overrides["schedule"] = schedule
    if not (inputs or named_inputs or keywords):
        return report_of_last_call(model, overrides, recorder)
    options = Options.from_backend_options(overrides)
    if isinstance(model, torch.nn.Module) and not _is_compiled(model):
        if options.granularity == OUTPUT:  # the whole model is called, and how it is computed is no part of the report
            model, overrides = compile(model, **{**overrides, "inner": "eager"}), {}
        else:
            prepare(model)
            model = torch.compile(model, backend=backend.moeca, options=overrides)
    programs: list[Program] = []

    def analyze(entry: Entry | OutputEntry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        if isinstance(entry, OutputEntry):
            if overrides:
                raise OptionError(
                    f"explain: {sorted(overrides)} can't be explained for a model that is compiled with "
                    "granularity='output'. Explain the model itself"
                )
            programs.append(entry.place(args, runtime)[0])
            return entry.run_uncached(args, "")
        handle_schedule = None if overrides.keys() & {"schedule", "order"} else runtime.schedule
        options = recorder.options(replace(runtime.options, **overrides))
        program = Program(entry.gm, args, entry.inputs, options, handle_schedule)
        programs.append(program)
        return tuple(program.analysis.gm(*args)) if is_dry(model) else tuple(entry.gm(*args))

    with torch.no_grad(), traced_dry(model):
        _intercept(model, inputs, {**named_inputs, **(keywords or {})}, analyze)
    states = states_of(model)
    broken = [state for state in states if state.parts]
    parts, breaks = sum(state.parts for state in broken), "\n".join(state.uncached for state in broken)
    if programs:
        if len(programs) > 1:
            recorder.forget()
        return replace(with_calls(model, report_of(programs), states), graphs=len(programs) + parts, breaks=breaks)
    if broken:
        return Report.of_parts(parts, breaks)
    raise CaptureError(
        "explain: no graph of the model came to this backend. Dynamo gave up on its whole forward "
        '(TORCH_LOGS="graph_breaks" shows why), or it was compiled for another backend'
    )


def _intercept(
    model: Any, inputs: Sequence[Any], keywords: dict[str, Any], interceptor: Interceptor
) -> tuple[Any, bool]:
    """Call the model with `interceptor` in place of its graphs; a second time if the first call only prepared it.

    Returns:
        The model's result, and whether any graph reached `interceptor`.
    """
    intercepted = False

    def note(entry: Entry, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Any, ...]:
        nonlocal intercepted
        intercepted = True
        return interceptor(entry, args, runtime)

    with intercepting(note, handle_of(model)):
        result = model(*inputs, **keywords)
        if not intercepted:
            result = model(*inputs, **keywords)
    return result, intercepted


def _is_compiled(model: torch.nn.Module) -> bool:
    return isinstance(model, OptimizedModule) or model._compiled_call_impl is not None
