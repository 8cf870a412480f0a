"""The web application: a label and a seed give a PNG, without torch; and the image that it is served from."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.slow
def test_a_label_and_a_seed_give_one_image(client: TestClient, bundle: Path) -> None:
    first = client.get("/digits/3?seed=7&steps=6")
    assert pixels(first).shape == (8, 8)
    assert client.get("/digits/3?seed=7&steps=6").content == first.content
    assert client.get("/digits/3?seed=8&steps=6").content != first.content
    assert http.png(http.draw(Session.open(bundle, threads=1), 3, 7, 6)) == first.content


@pytest.mark.parametrize("query", ["10", "-1", "three", "3?seed=-1", "3?steps=0", "3?steps=201"])
def test_a_request_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/digits/{query}").status_code == 422


def events_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.strip().split("\n\n")]


def test_the_page_shows_every_step(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "EventSource(`digits/${label}/steps" in page.text
    events = events_of(client.get("/digits/3/steps?seed=7&steps=6"))
    assert [(event["step"], event["steps"]) for event in events] == [(step, 6) for step in range(1, 7)]
    assert len({event["png"] for event in events}) == 6
    last = base64.b64decode(events[-1]["png"])
    assert last == client.get("/digits/3?seed=7&steps=6").content


@pytest.mark.parametrize("query", ["10/steps", "3/steps?seed=-1", "3/steps?steps=0", "3/steps?steps=x"])
def test_steps_that_make_no_sense_are_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/digits/{query}").status_code == 422


def test_several_users_at_once(client: TestClient) -> None:
    queries = [f"/digits/{number % 10}?seed={number}&steps=4" for number in range(8)]
    alone = [client.get(query).content for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert [response.content for response in pool.map(client.get, queries)] == alone


def test_too_many_at_once_are_refused(client: TestClient) -> None:
    """And every place is free again afterwards, whatever became of the requests."""
    places = client.app.state.places  # type: ignore[attr-defined]
    for _ in range(http.MOST):
        assert places.acquire(blocking=False)
    for query in ("/digits/3?steps=2", "/digits/3/steps?steps=2"):
        refused = client.get(query)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    for _ in range(http.MOST):
        places.release()
    for _ in range(http.MOST + 1):
        assert len(events_of(client.get("/digits/3/steps?steps=2"))) == 2


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
