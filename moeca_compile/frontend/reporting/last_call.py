"""The report of the last call of a compiled model; where there was none, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeca_compile.errors import StateError
from moeca_compile.frontend.handles import states_of
from moeca_compile.frontend.model_arguments import is_compiled_here
from moeca_compile.frontend.reporting.calls import with_calls
from moeca_compile.frontend.reporting.recorder import GraphRecorder
from moeca_compile.frontend.summary import report_of
from moeca_compile.inspect.report import Report


def report_of_last_call(model: Any, options: Mapping[str, Any], recorder: GraphRecorder) -> Report:
    """The report of the last call.

    Args:
        model: that was compiled.
        options: that the caller named; they can't be explained without inputs.
        recorder: of the graphs of the passes.

    Raises:
        StateError: there was no call, or there are options.
    """
    states = states_of(model)
    programs = [program for state in states for program in state.runtime.programs.values()]
    uncached = [state for state in states if state.uncached]
    if options or not (programs or uncached):
        raise StateError(f"explain: {_what_to_do(model, options)}")
    if programs:
        recorder.rewrite(programs[-1])
        return replace(with_calls(model, report_of(programs[-1:]), states), graphs=len(programs))
    return Report.of_parts(sum(state.parts for state in uncached), "\n".join(state.uncached for state in uncached))


def _what_to_do(model: Any, options: Mapping[str, Any]) -> str:
    inputs = "pass inputs as the model takes them: explain(model, *inputs)"
    if options:
        return f"options are explained for inputs. Please {inputs}"
    if not is_compiled_here(model):
        return (
            f"this {type(model).__name__} isn't compiled with moeca, so there is no call to explain. Compile it with "
            f"moeca_compile.compile(...) and run it once, then explain it; or {inputs}"
        )
    return f"no call of the compiled model was made yet. Run it once, then explain it; or {inputs}"
