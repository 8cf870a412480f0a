"""The web application: a label and a seed give a PNG, without torch; and the image that it is served from."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import moeca_compile as moeca
from moeca_compile.runtime import Session
from tests.models import DiT

http = importlib.import_module("examples.06_serve_http")
ROOT = Path(http.__file__).parents[1]
RECIPE = ROOT / "examples" / "Dockerfile"
OUTSIDE = {"digits.moeca"}  # what the example before it writes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DiT("dense", depth=1, dim=16, hidden=24, heads=2, channels=1, num_experts=2).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("http") / "digits.moeca"
    inputs = torch.randn(2, 1, 8, 8), torch.full((2,), 1000.0), torch.tensor([1, 2])
    moeca.export(model, inputs, "uniform:3", path)
    return path


@pytest.fixture(scope="module")
def client(bundle: Path) -> TestClient:
    return TestClient(http.application(bundle))


def pixels(response: Any) -> Any:
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_a_label_and_a_seed_give_one_image(client: TestClient, bundle: Path) -> None:
    first = client.get("/digits/3?seed=7&steps=6")
    assert pixels(first).shape == (8, 8)
    assert client.get("/digits/3?seed=7&steps=6").content == first.content
    assert client.get("/digits/3?seed=8&steps=6").content != first.content
    assert http.png(http.draw(Session.open(bundle, threads=1), 3, 7, 6)) == first.content


@pytest.mark.parametrize("query", ["10", "-1", "three", "3?seed=-1", "3?steps=0", "3?steps=201"])
def test_a_request_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/digits/{query}").status_code == 422


def test_it_draws_where_torch_cannot_be_imported(bundle: Path) -> None:
    code = (
        "import importlib, sys; sys.modules['torch'] = None; http = importlib.import_module('examples.06_serve_http');"
        "from moeca_compile.runtime import Session; http.application(sys.argv[1]);"
        "assert http.draw(Session.open(sys.argv[1]), 1, 0, 3).shape == (8, 8)"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], cwd=ROOT, check=True)


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and its arguments."""
    text = re.sub(r"^#.*\n", "", RECIPE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def test_the_dockerfile_installs_what_serving_needs_and_no_torch() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "CMD"}
    commands = [rest for name, rest in instructions() if name == "RUN"]
    assert all(command.startswith("pip install --no-cache-dir ") for command in commands)
    listed = {word for command in commands for word in command.split()[4:]}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[<>=]", name)[0] for name in needed} - {"torch"} <= listed
    assert "torch" not in listed
    (own,) = [command for command in commands if command.endswith(" .")]
    assert "--no-deps" in own


def test_the_dockerfile_copies_what_there_is_and_starts_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "constraints.txt").exists():
        pytest.skip("needs the checkout")
    for name, rest in instructions():
        if name == "COPY":
            sources = set(rest.split()[:-1])
            assert all((ROOT / source).exists() for source in sources - OUTSIDE), rest
    (command,) = [rest for name, rest in instructions() if name == "CMD"]
    program, option, module, *arguments = json.loads(command)
    assert (program, option, module) == ("python", "-m", "examples.06_serve_http")
    served: list[str] = []
    uvicorn = SimpleNamespace(run=lambda app, host, port: served.append(host))
    monkeypatch.setitem(sys.modules, "uvicorn", uvicorn)
    monkeypatch.setattr(http, "application", lambda bundle: None)
    http.main(arguments)
    assert served == ["0.0.0.0"]
