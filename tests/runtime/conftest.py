"""One toy model for all hazards of a file: captured once, reset before each test."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.frontend.entry import ENTRIES
from tests.sampling import compiled, dit, uncached


@pytest.fixture(autouse=True)
def loud_dynamo() -> Iterator[None]:
    """After eight graphs of one function Dynamo runs it eagerly: then nothing would be tested here."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def shared() -> tuple[nn.Module, nn.Module, nn.Module]:
    module = dit()
    return compiled(module), uncached(module), compiled(copy.deepcopy(module))


@pytest.fixture
def model(shared: tuple[nn.Module, ...]) -> nn.Module:
    """Compiled with one computed step in three."""
    for entry in list(ENTRIES):  # so that each test gets the warnings that are given once
        for program in entry.programs.values():
            program.warned.clear()
    moeca.reset(shared[0])
    return shared[0]


@pytest.fixture
def full(shared: tuple[nn.Module, ...]) -> nn.Module:
    """The same weights with everything computed."""
    return shared[1]


@pytest.fixture
def twin(shared: tuple[nn.Module, ...]) -> nn.Module:
    """As `model`, but of its own weights, so that the two can't share any state."""
    moeca.reset(shared[2])
    return shared[2]
