"""The graphs and the report of a tiny model, as text: a change to any of them must be seen and wanted.

`MOECA_GOLDEN=1 pytest tests/test_golden.py` writes the files anew; look at the difference before keeping it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import moeca_compile as moeca
from moeca_compile.graph import fx
from moeca_compile.pipeline import Analysis
from tests.models import DiT
from tests.tools import analyze_module, variant_of

FOLDER = Path(__file__).parent / "golden"
SHORT = {"float32": "f32", "bfloat16": "bf16", "float64": "f64", "int64": "i64", "int32": "i32", "bool": "b8"}


def tiny() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=1, dim=8, heads=2, num_experts=3, top_k=2, hidden=6, size=4, channels=2).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 2, 4, 4), torch.full((2,), 500.0), torch.tensor([1, 2])


@cache
def analysis() -> Analysis:
    model = tiny()
    moeca.prepare(model)
    return analyze_module(model, *inputs())


# -- printing ---------------------------------------------------------------------------------------------------------


def graph_text(gm: GraphModule) -> str:
    """One line a node. Inputs keep their names, all others are numbered: how torch names nodes doesn't matter."""
    names: dict[Node, str] = {}
    for node in gm.graph.nodes:
        inner = len(names) - sum(one.op == "placeholder" for one in names)
        names[node] = node.name if node.op == "placeholder" else f"%{inner}"
    return "\n".join(lines(gm, names)) + "\n"


def lines(gm: GraphModule, names: dict[Node, str]) -> Iterator[str]:
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            yield f"{names[node]}: {kind(fx.value(node))}"
        elif node.op == "output":
            yield f"return {argument(node.args[0], names)}"
        else:
            given = [argument(one, names) for one in node.args]
            given += [f"{key}={argument(one, names)}" for key, one in node.kwargs.items()]
            yield f"{names[node]}: {kind(fx.value(node))} = {operator(node.target)}({', '.join(given)})"


def operator(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{SHORT[str(value.dtype).removeprefix('torch.')]}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(kind, value))})"
    return type(value).__name__


def argument(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(argument(one, names) for one in value)}]"
    return str(value)


def report_text() -> str:
    """What `explain` prints, and its passes with the nodes before and after; without the times."""
    torch._dynamo.reset()
    report = moeca.explain(tiny(), *inputs(), schedule="uniform:3", inner="eager")
    passes = [f"{name}  {before}  {after}\n" for name, _, before, after in report.passes]
    timeless = replace(report, passes=tuple((name, 0.0, *rest) for name, _, *rest in report.passes))
    return f"{timeless}\n\n{''.join(passes)}"


TEXTS = {
    "normalized": lambda: graph_text(analysis().gm),
    "compute": lambda: graph_text(variant_of(analysis(), "CC", 2, ("FF",)).gm),
    "forecast": lambda: graph_text(variant_of(analysis(), "FF", 2).gm),
    "attention_only": lambda: graph_text(variant_of(analysis(), "CR", 1, ("FF",)).gm),
    "report": report_text,
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_the_one_that_was_agreed_on(name: str) -> None:
    path, text = FOLDER / f"{name}.txt", TEXTS[name]()
    if os.environ.get("MOECA_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing: MOECA_GOLDEN=1 writes it"
    assert text == path.read_text(), f"{path.name} differs; if that is wanted, MOECA_GOLDEN=1 writes it anew"


def test_every_golden_file_is_compared() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.txt" for name in TEXTS}


def test_the_printed_graph_does_not_depend_on_node_names() -> None:
    gm = torch.fx.GraphModule(analysis().gm, torch.fx.Graph())
    gm.graph.output(gm.graph.graph_copy(analysis().gm.graph, {}))
    for number, node in enumerate(gm.graph.nodes):
        if node.op == "call_function":
            node._rename(f"other_{number}")
    assert graph_text(gm) == graph_text(analysis().gm)


def test_the_report_names_no_time_and_no_place() -> None:
    text = report_text()
    assert not re.search(r"[1-9]\d*\.\d+ *ms|/\w+/", text)
