"""The house rules that no single file shows: who may import whom, what an import drags in, how long a file may be."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import moeca_compile
from tests.docs.pages import git

PACKAGE = Path(moeca_compile.__file__).parent
ROOT = Path(__file__).parents[1]
LINE_CEILING = 400

# Rooms and files of the root, in an order in which each may import those before it: nothing goes round in a circle.
ORDER = (
    "errors",
    "dtypes",
    "schedule",  # what runs when
    "options",
    "graph",  # the captured graph
    "ops",  # the moeca:: operators
    "expert_dispatch",  # an expert dispatch -> one traceable operator
    "inspect",  # reports and pictures
    "passes",
    "runtime",  # bundles, where there is no torch
    "lowering",  # variants -> Inductor, ONNX, TensorRT
    "pipeline",  # all stages and passes, in order
    "engine",  # the torch executor
    "frontend",  # what torch.compile calls
    "backend",  # where torch finds it
    "api",  # what people call
    "exporting",  # a bundle: the same stages, written down instead of run
    "planner",  # calibrate: schedules for a model
    "distributed",  # the same on several ranks
    "comparison",  # compare: speed and quality of what is cached
    "__init__",
    "cli",
)
# What needs less than all before it.
ONLY = {
    "schedule": {"errors"},
    "expert_dispatch": {"errors", "graph.regions", "ops"},
    "inspect": {"errors", "graph.regions", "schedule"},
    "runtime": {"dtypes", "errors", "graph.variant", "schedule"},
    "planner.search": {"errors", "schedule"},
}
# What may be imported at the top of a file; a heavier package belongs inside the function that needs it.
LIGHT = {"moeca_compile", "msgspec", "numpy", "torch"}
HEAVY = ("matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino", "rich", "sklearn", "tensorrt", "transformers")


def module_name(path: Path) -> str:
    """`graph.fx` for graph/fx.py, `passes` for passes/__init__.py, `__init__` for the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree: ast.AST) -> set[str]:
    """Absolute names of the modules that the code imports; `from a.b import c` gives a.b.c where that is a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for full in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(full if full.removeprefix("moeca_compile.") in MODULES else node.module)
    return found


def rooms_of(tree: ast.AST) -> set[str]:
    """The modules of ours that the code imports, by their name inside the package."""
    ours = {name for name in imports_of(tree) if name.split(".")[0] == "moeca_compile"}
    return {name.removeprefix("moeca_compile").lstrip(".") or "__init__" for name in ours}


class AtImport(ast.NodeTransformer):
    """Leaves what runs when the file is imported: no function bodies, nothing under `if TYPE_CHECKING`."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_files() -> list[Path]:
    """Every text file of the checkout that is tracked or about to be."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    room = name.split(".")[0]
    assert room in ORDER, f"{room} is a new room: ORDER must say what it may import"
    special = next((allowed for part, allowed in ONLY.items() if f"{name}.".startswith(f"{part}.")), None)
    allowed = set(ORDER[: ORDER.index(room)]) if special is None else special
    own = room if special is None else next(part for part in ONLY if f"{name}.".startswith(f"{part}."))
    wrong = {
        other
        for other in rooms_of(ast.parse(MODULES[name].read_text()))
        if not any(other == part or other.startswith(f"{part}.") for part in (*allowed, own))
    }
    assert not wrong, f"{name} imports {sorted(wrong)}; it may import {sorted(allowed)}"


def test_a_room_can_be_looked_over() -> None:
    """No folder has more than 16 files, and there are no more than 14 rooms."""
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    assert not {str(path): n for path in folders if (n := len(list(path.glob("*.py")))) > 16}
    assert len([path for path in folders if path.parent == PACKAGE]) <= 14


@pytest.mark.parametrize("name", MODULES)
def test_heavy_imports_are_inside_functions(name: str) -> None:
    tops = {other.split(".")[0] for other in imports_of(AtImport().visit(ast.parse(MODULES[name].read_text())))}
    own = {"rich", "typer"} if name.split(".")[0] == "cli" else set()  # a program of its own: nothing imports it
    assert not tops - LIGHT - own - sys.stdlib_module_names


def test_root_import_is_light() -> None:
    """Neither torch nor any optional package comes with `import moeca_compile`; its names are resolved on first use."""
    loaded = run_python("import sys, moeca_compile; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert not {"torch", *HEAVY} & set(loaded.split())


def test_public_names_resolve() -> None:
    for name in moeca_compile.__all__:
        assert getattr(moeca_compile, name) is not None
    assert set(moeca_compile.__all__) <= set(dir(moeca_compile))


def test_backend_import_is_light() -> None:
    loaded = run_python("import sys, moeca_compile.backend; print(*sorted({n.split('.')[0] for n in sys.modules}))")
    assert not set(HEAVY) & set(loaded.split())


def test_runtime_needs_no_torch() -> None:
    run_python("import sys; sys.modules['torch'] = None; import moeca_compile.runtime")


@pytest.mark.parametrize("name", ["lowering.tensorrt.build", "lowering.tensorrt.worker", "runtime.triton.model", "cli"])
def test_what_serving_machines_need_no_torch_for(name: str) -> None:
    run_python(f"import sys; sys.modules['torch'] = None; import moeca_compile.{name}")


def test_runtime_pulls_in_no_compiler() -> None:
    loaded = run_python("import sys, moeca_compile.runtime; print(*sys.modules)").split()
    assert not [
        name
        for name in loaded
        if re.match(r"moeca_compile\.(passes|planner|lowering|expert_dispatch|pipeline)\b", name)
    ]


def test_backend_is_registered_by_entry_point() -> None:
    (entry,) = (e for e in entry_points(group="torch_dynamo_backends") if e.name == "moeca")
    assert entry.value == "moeca_compile.backend:moeca"
    assert callable(entry.load())


def test_package_ships_its_types() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_no_file_is_over_the_ceiling() -> None:
    roots = (PACKAGE, *(ROOT / name for name in ("tests", "examples", "benchmarks")))
    files = (path for root in roots for path in root.rglob("*.py"))
    counted = {str(path): path.read_text().count("\n") for path in files}
    assert not {path: lines for path, lines in counted.items() if lines > LINE_CEILING}


def test_every_numbered_example_has_main() -> None:
    examples = sorted((ROOT / "examples").glob("[0-9]*.py"))
    assert examples
    for path in examples:
        body = ast.parse(path.read_text()).body
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body), path.name


def test_no_path_of_a_machine_is_tracked() -> None:
    machine_path = re.compile(r"(?<![\w.])/(work|tmp|root|home|Users)/")
    for path in text_files():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not machine_path.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_slow_tests_that_ci_names_are_there() -> None:
    names = ROOT / ".ci/slow.txt"
    if not names.exists():
        pytest.skip("needs the checkout")
    lines = names.read_text().splitlines()
    assert len(lines) == len(set(lines))
    for line in lines:
        file, *parts = line.split("[")[0].split("::")
        found = (ROOT / file).is_dir() or (ROOT / file).read_text()
        assert found is True or all(re.search(rf"^ *(def|class) {part}\b", found, re.MULTILINE) for part in parts), line


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_the_pages_are_make_targets(page: str) -> None:
    if not (ROOT / page).exists():
        pytest.skip("needs the checkout")
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", (ROOT / page).read_text(), flags=re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    assert named
    assert named <= targets


@pytest.mark.parametrize("name", ["moeca_compile", "moeca_compile.planner", "moeca_compile.runtime"])
def test_a_type_checker_sees_what_runs(name: str) -> None:
    """What is imported when it is first used is imported under TYPE_CHECKING too: each name from the same place."""
    package = importlib.import_module(name)
    tree = ast.parse(Path(str(package.__file__)).read_text())
    told = {
        alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {one: getattr(package, one) for one in package.__all__}
