"""What a public docstring has to say, and which names are public."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from moeca_compile import errors

ROOMS = (
    "moeca_compile",
    "moeca_compile.distributed",
    "moeca_compile.errors",
    "moeca_compile.expert_dispatch",
    "moeca_compile.passes",
    "moeca_compile.runtime",
    "moeca_compile.runtime.triton",
    "moeca_compile.schedule",
)
RETURNED = (  # classes that the functions above give or take
    "moeca_compile.engine.trajectories.trajectory:Trajectory",
    "moeca_compile.expert_dispatch.families.family:Family",
    "moeca_compile.expert_dispatch.families.registry:register",
    "moeca_compile.expert_dispatch.families.registry:unregister",
    "moeca_compile.expert_dispatch.report:PreparedModule",
    "moeca_compile.expert_dispatch.report:PrepareReport",
    "moeca_compile.graph.regions:HoistedValue",
    "moeca_compile.graph.regions:Region",
    "moeca_compile.graph.regions:Rejected",
    "moeca_compile.inspect.report:Report",
    "moeca_compile.inspect.report:VariantReport",
    "moeca_compile.lowering.tensorrt.build:EngineRequest",
    "moeca_compile.runtime.batched.calls:Policy",
    "moeca_compile.runtime.batched.calls:Waiting",
    "moeca_compile.engine.batched.loop:PooledLoop",
    "moeca_compile.runtime.batched.requests:Request",
    "moeca_compile.runtime.batched.scheduler:CallRecord",
    "moeca_compile.runtime.batched.session:PooledTrajectory",
    "moeca_compile.runtime.bundle.fused:FusedSession",
    "moeca_compile.runtime.bundle.fused:FusedTrajectory",
    "moeca_compile.runtime.trajectory:Trajectory",
    "moeca_compile.runtime.stats:Stats",
    "moeca_compile.runtime.stats:StepRecord",
    "moeca_compile.schedule.adaptive:Adaptive",
)
INTERNAL = {  # methods that only the package calls; a leading underscore would break their callers
    "Control": {"from_entries"},
    "Adaptive": {"from_entries"},
    "Harness": {"copy", "disagreement", "disagreement_on_own_weights", "holding", "observed", "parameters", "routed"},
    "ModuleCode": {"hidden", "unreadable"},
    "Report": {"of_parts"},
    "Rewrite": {"fitting", "following", "function", "of"},
    "Routed": {"branches"},
    "BatchedModel": {"admit", "leave", "serve"},
    "BatchedSession": {"leave", "serve"},
    "PooledLoop": {"commit", "plan"},
    "Request": {"end"},
    "Trajectory": {"commit", "declared", "miss", "plan", "serves", "told"},
    "Session": {"dropped_branches", "for_sizes_of", "outputs_by_name", "variant_of"},
}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def public_values() -> dict[str, Any]:
    """Functions and classes by the name that an import would use."""
    values = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if is_of(module, v)]
        values |= {f"{room}.{name}": getattr(module, name) for name in names}
    for path in RETURNED:
        module_name, name = path.split(":")
        values[path.replace(":", ".")] = getattr(importlib.import_module(module_name), name)
    kinds = (type, types.FunctionType)
    first = {id(value): name for name, value in reversed(values.items()) if isinstance(value, kinds)}
    return {name: values[name] for name in reversed(first.values())}


def is_of(module: types.ModuleType, value: object) -> bool:
    name = getattr(value, "__name__", "_")
    return getattr(value, "__module__", None) == module.__name__ and not name.startswith("_") and callable(value)


def problems_of(name: str, value: Any) -> Iterator[str]:
    """What is missing from the docstring of a function, or of a class and its public methods."""
    if not isinstance(value, type):
        yield from problems_of_function(name, value)
        return
    text = value.__dict__.get("__doc__") or ""
    if not is_sentence(text) or text.startswith(f"{value.__name__}("):
        yield f"{name}: the class has no docstring"
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        yield from missing(name, fields, entries_of(text, "Attributes"), "Attributes")
    for attribute, member in vars(value).items():
        if attribute.startswith("_") or attribute in INTERNAL.get(value.__name__, ()):
            continue
        where = f"{name}.{attribute}"
        if isinstance(member, property):
            if not is_sentence(member.__doc__ or ""):
                yield f"{where}: the property has no docstring"
        elif inspect.isfunction(function := inspect.unwrap(getattr(member, "__func__", member))):
            yield from problems_of_function(where, function)


def problems_of_function(name: str, function: Any) -> Iterator[str]:
    text = inspect.getdoc(function) or ""
    if not is_sentence(text):
        yield f"{name}: no docstring, or a first sentence without an end"
        return
    signature = inspect.signature(function)
    parameters = [parameter for parameter in signature.parameters if parameter not in ("self", "cls")]
    yield from missing(name, parameters, entries_of(text, "Args"), "Args")
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if returns and not ({"Returns", "Yields"} & sections_of(text).keys()):
        yield f"{name}: Returns is missing"
    told = entries_of(text, "Raises")
    yield from missing(name, sorted(raised_by(function)), told, "Raises")
    for error in told - ERRORS - {"KeyboardInterrupt"}:
        yield f"{name}: Raises names {error}, which is no error of the package"


def missing(name: str, wanted: list[str], told: set[str], section: str) -> Iterator[str]:
    for one in wanted:
        if one not in told:
            yield f"{name}: {section} doesn't name {one}"


def is_sentence(text: str) -> bool:
    return bool(re.search(r"[\w`)][.:?!](\s|$)", text.strip()))


def sections_of(text: str) -> dict[str, str]:
    """The sections of a docstring in Google's style by title."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries_of(text: str, section: str) -> set[str]:
    """The names that a section explains: `name:`, or `first, second:`, at its outermost indentation."""
    names: set[str] = set()
    for heads in re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", sections_of(text).get(section, ""), re.MULTILINE):
        names |= {head.lstrip("*") for head in heads.split(", ")}
    return names


def raised_by(function: Any) -> set[str]:
    """Errors of the package that its own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised.add(ast.unparse(node.exc.func).split(".")[-1])
    return raised & ERRORS
