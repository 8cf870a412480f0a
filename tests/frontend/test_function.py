"""Other ways in: a compiled function that closes over a model; one model compiled many times."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.frontend.entry import ENTRIES
from moeca_compile.frontend.handles import all_states
from tests.models import DiT
from tests.sampling import TIMES, compiled, dit, plain, run, same


def test_a_function_over_a_model_has_the_model_s_regions() -> None:
    model = DiT(depth=1).eval()
    moeca.prepare(model)

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = model(x, t, y)
        return out * 2

    inputs = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 900.0]), torch.tensor([1, 2])
    known = set(ENTRIES)
    compiled = torch.compile(guided, backend="moeca", options={"inner": "eager"})
    with torch.no_grad():
        compiled(*inputs)
    (entry,) = set(ENTRIES) - known
    (program,) = entry.programs.values()
    whole = moeca.explain(model, *inputs, inner="eager")
    assert program.regions.keys == tuple(region.key for region in whole.regions)
    assert program.regions.fingerprint == whole.fingerprint


@pytest.mark.slow
def test_one_model_compiled_in_many_ways_is_cached_in_each() -> None:
    """Dynamo counts recompilations by a model's code, and past its limit would run eager, uncached."""
    model = DiT(depth=1).eval()
    x, y = torch.ones(2, 4, 8, 8), torch.tensor([1, 2])
    limit = 2
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=limit):
        for interval in range(2, limit + 4):
            handle = moeca.compile(model, schedule=f"uniform:{interval}", inner="eager")
            for step in range(3):
                handle(x + 0.01 * step, torch.full((2,), 900.0 - step), y)
            assert moeca.stats(handle).mac_fraction < 1


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.slow
def test_a_dropped_function_and_its_model_leave_nothing() -> None:
    """torch keeps what it compiled of a function on its code, which all functions of one `def` share."""
    x, y = torch.ones(2, 4, 8, 8), torch.tensor([1, 2])

    def use() -> list[weakref.ref[Any]]:
        model = DiT(depth=1).eval()
        moeca.prepare(model)

        def guided(*args: Any) -> Any:
            return model(*args)

        compiled = torch.compile(guided, backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
        with torch.no_grad():
            for step in range(3):
                compiled(x, torch.full((2,), 900.0 - step), y)
        assert moeca.stats(compiled).mac_fraction < 1
        return [weakref.ref(model), *map(weakref.ref, model.parameters())]

    def alive() -> tuple[set[Any], set[Any]]:
        for _ in range(3):
            gc.collect()
        return set(map(id, ENTRIES)), set(map(id, all_states()))

    before = alive()
    dropped = use()
    assert alive() == before
    assert not any(one() is not None for one in dropped)


@pytest.mark.slow
def test_a_function_over_a_prepared_model_is_cached() -> None:
    module = dit()
    moeca.prepare(module)
    model = torch.compile(
        lambda x, t, y: module(x, t, y).clone(), backend="moeca", options={"schedule": "uniform:3", "inner": "eager"}
    )
    first = run(plain(model))
    assert same(run(plain(model)), first)
    assert same(first, run(plain(compiled(module))))
    with moeca.trajectory(model, steps=len(TIMES), stream="only"):
        assert same(run(plain(model)), first)
    assert [record.variant for record in moeca.stats(model).steps][:4] == ["v0", "v1", "v1", "v0"]


@pytest.mark.slow
def test_a_function_over_an_unprepared_model_prepares_it_and_is_cached() -> None:
    module = dit()
    model = torch.compile(
        lambda x, t, y: module(x, t, y).clone(), backend="moeca", options={"schedule": "uniform:3", "inner": "eager"}
    )
    first = run(plain(model))
    for one, again in zip(first, run(plain(compiled(module))), strict=True):
        assert torch.allclose(one, again, rtol=1e-5, atol=1e-6)
    assert [record.variant for record in moeca.stats(model).steps][:4] == ["v0", "v1", "v1", "v0"]
