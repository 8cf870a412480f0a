"""What holds for every test: one thread (shared cores), no GPU test without a GPU, and facts are collected."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import durations, facts, torch_once

torch.set_num_threads(1)

# A loaded machine is no failure. The examples are the same every time; with MOECA_EXPLORE set, new ones are tried.
settings.register_profile(
    "ours",
    deadline=None,
    derandomize="MOECA_EXPLORE" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")

torch_once.import_without_collector()
torch_once.measure_no_guards()
torch_once.trace_for_nobody()
torch_once.log_no_settings()

# where passes are under test each is checked after it ran; elsewhere that would only take time
VERIFIED = {"passes", "graph", "lowering", "architectures", "real", "test_golden.py", "test_oracle.py"}
VERIFY = os.environ.get("MOECA_VERIFY")

FOUND: facts.Facts = {}


@pytest.fixture
def own_garbage() -> None:
    """The collector looks at what the test makes, and at nothing that is there already: looking takes long."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByUnit(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return durations.unit_of(nodeid)

    return ByUnit(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        durations.longest_first(items)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch_once.forget_sizes()
    here = item.path.relative_to(Path(__file__).parent).parts[0]
    os.environ["MOECA_VERIFY"] = VERIFY if VERIFY is not None else "1" if here in VERIFIED else ""


def pytest_collection_finish() -> None:
    torch_once.collect_rarely()
    durations.begin()


@pytest.fixture
def fact(record_property: facts.Recorder) -> facts.Recorder:
    """Say what this test establishes: `fact(table, row, column="text")`. It counts if the test passes."""

    def record(table: str, row: str, **columns: str) -> None:
        record_property("fact", (table, row, columns))

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    durations.measure(report)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    durations.add(report)
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "fact":
                table, row, columns = value
                facts.merge(FOUND, table, row, columns)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not facts.DOCS.exists():
        return  # a worker of pytest-xdist reports to the one who started it
    durations.write_if_asked()
    if os.environ.get("MOECA_DOCS"):
        facts.write(FOUND if os.environ["MOECA_DOCS"] != "add" else facts.added(facts.load(), FOUND))
    elif (wrong := facts.differing(FOUND, facts.load())) and session.exitstatus == pytest.ExitCode.OK:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        for line in ("", "docs/models.json is out of date, `make docs` makes it anew:", *wrong):
            reporter.write_line(line, red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
