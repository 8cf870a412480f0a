"""Frozen trajectories: the same values without Dynamo's looking, and Dynamo's way wherever a call isn't as before."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, StateError
from tests.sampling import (
    Loop,
    cfg_batched,
    cfg_calls,
    compiled,
    dit,
    in_place,
    noise,
    plain,
    records,
    run,
    same,
    under_compile_lock,
)  # fmt: skip

LOOPS: dict[str, Callable[[Any], Loop]] = {
    "plain": plain, "in place": in_place, "cfg": cfg_batched, "cfg in two calls": cfg_calls,
    "guided at first": lambda model: cfg_batched(model, guided=range(4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return compiled(dit())


@pytest.fixture
def model(shared: nn.Module) -> nn.Module:
    """Captured once for all tests that leave it as it is."""
    moeca.reset(shared)
    return shared


class Ways:
    """How often a model's calls went Dynamo's way."""

    def __init__(self, model: nn.Module) -> None:
        moeca.trajectory(model, frozen=True)  # puts the shortcut in place
        self.count, self.model = 0, model
        through = model.forward.call

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return through(*args, **kwargs)

        model.forward.call = counted


def frozen(model: nn.Module, loop: Callable[[Any], Loop]) -> list[Tensor]:
    with moeca.trajectory(model, frozen=True):
        return under_compile_lock(model, loop)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_frozen_trajectory_gives_the_same_bits_past_dynamo(loop: Callable[[Any], Loop], model: nn.Module) -> None:
    truth = under_compile_lock(model, loop)
    ways = Ways(model)
    for _ in range(2):
        ways.count = 0
        found = frozen(model, loop)
        assert same(found, truth)
        assert ways.count == (2 if loop is LOOPS["guided at first"] else 1), "once for each kind of call"
    assert not any(one.cold for one in records(model))


@pytest.mark.slow
def test_graphs_for_many_sizes_are_given_the_sizes() -> None:
    module = dit()
    moeca.prepare(module)
    options = {"schedule": "uniform:3", "inner": "eager"}
    model = torch.compile(module, backend="moeca", options=options, dynamic=True)
    sizes = [partial(plain, batch=batch) for batch in (2, 3)]
    truth = [under_compile_lock(model, loop) for loop in sizes]
    ways = Ways(model)
    assert all(same(frozen(model, loop), one) for loop, one in zip(sizes, truth, strict=True))
    assert ways.count == 2


def test_a_named_stream_is_frozen_with_its_own_count(model: nn.Module) -> None:
    truth = under_compile_lock(model, plain)
    streams = {name: moeca.trajectory(model, 10, name, frozen=True) for name in ("a", "b")}
    loops = [plain(model, enter=lambda _, name=name: streams[name]) for name in streams]
    found = [[next(loop) for loop in loops] for _ in truth]
    for i in range(2):
        assert same([pair[i] for pair in found], truth)
    with pytest.raises(StateError, match="declared with steps=10, and this is call 11"), streams["a"]:
        model(noise(0, 2), torch.full((2,), 10.0), torch.tensor([3, 3]))


def test_a_model_compiled_in_place() -> None:
    model = dit()
    moeca.prepare(model)
    model.compile(backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    truth = under_compile_lock(model, plain)
    assert same(frozen(model, plain), truth)


# -- what calls give, and take ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    sample: Tensor
    other: None = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda v: (v, None),
    "dict": lambda v: {"sample": v, "kind": "velocity"},
    "ordered": lambda v: OrderedDict(sample=v),
    "named": Pair,
    "nested": lambda v: [{"a": (v,)}, 3],
}


class Giving(nn.Module):
    """What DiT gives, wrapped; it takes its labels in a dictionary."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.wrap = dit(), wrap

    def forward(
        self, x: Tensor, t: Tensor, conditions: dict[str, Tensor], scale: float = 1.0, sign: str = "+", **unused: Any
    ) -> Any:
        v = self.model(x, t, conditions["labels"]) * scale
        return self.wrap(v if sign == "+" else -v)


def steps_of(model: nn.Module, **keywords: Any) -> list[Any]:
    labels, x = torch.tensor([1, 2]), noise(0, 2)
    with torch.no_grad():
        return [
            model(x * (1 - i / 9), torch.full((2,), 900.0 - 9 * i), {"labels": labels}, **keywords) for i in range(6)
        ]


def equal(some: Any, others: Any) -> bool:
    """In structure, and bit by bit."""
    (left, form), (right, other) = tree_flatten(some), tree_flatten(others)
    pairs = zip(left, right, strict=True)
    return form == other and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_whatever_holds_the_outputs_comes_back(kind: str) -> None:
    model = compiled(Giving(OUTPUTS[kind]))
    truth = steps_of(model)
    ways = Ways(model)
    with moeca.trajectory(model, frozen=True):
        found = steps_of(model)
    assert ways.count == 1
    assert [type(one) for one in found] == [type(one) for one in truth]
    assert equal(found, truth)


@pytest.mark.parametrize(
    ("change", "ways"),
    [
        ({"sign": "-"}, 2),
        pytest.param({"scale": 2.5}, 2, marks=pytest.mark.slow),
        ({"unused": object()}, 7),
        ({"unused": [torch.ones(())]}, 2),
    ],
    ids=["another text", "another number", "an object of unknown kind", "one more tensor"],
)
def test_other_arguments_are_another_kind_of_call(change: dict[str, Any], ways: int) -> None:
    model = compiled(Giving(OUTPUTS["tuple"]))
    truth = steps_of(model), steps_of(model, **change)
    seen = Ways(model)
    with moeca.trajectory(model, frozen=True):
        found = steps_of(model), steps_of(model, **change)
    assert equal(found, truth)
    assert seen.count == ways


class Twice(nn.Module):
    """One that takes two latents, which may be the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dit()

    def forward(self, x: Tensor, other: Tensor, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.model(x, t, y) - other
        return result


@pytest.mark.slow
def test_a_tensor_that_is_given_twice_is_another_kind_of_call() -> None:
    model = compiled(Twice())
    x, y = noise(0, 2), torch.tensor([1, 2])

    def steps(frozen: bool) -> list[Tensor]:
        with torch.no_grad(), moeca.trajectory(model, stream="only", frozen=frozen):
            given = [(x, x if i < 3 else x.clone() + i) for i in range(6)]
            return [model(*two, torch.full((2,), 900.0 - 9 * i), y) for i, two in enumerate(given)]

    truth = steps(False)
    ways = Ways(model)
    assert same(steps(True), truth)
    assert ways.count == 2


TABLE = torch.ones(())


class Reading(nn.Module):
    """A model that reads a tensor which is neither a weight nor the call's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = dit()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.model(x, t, y) * TABLE
        return result


class Echoing(Reading):
    """One whose result holds a tensor of the call's."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.model(x, t, y), y


@pytest.mark.parametrize("kind", [Reading, Echoing])
def test_calls_that_can_not_be_traced_back_go_dynamo_s_way(kind: type[nn.Module]) -> None:
    model = compiled(kind())
    ways = Ways(model)
    x, y = noise(0, 2), torch.tensor([1, 2])
    with torch.no_grad(), moeca.trajectory(model, frozen=True):
        for i in range(5):
            given = x, torch.full((2,), 900.0 - 9 * i), y
            found = model(*given)
            assert kind is Reading or found[1] is y
    assert ways.count == 5


# -- who else is there ------------------------------------------------------------------------------------------------


def test_the_promise_ends_with_the_trajectory() -> None:
    module = dit()
    model = compiled(module)
    frozen(model, plain)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)
    assert same(under_compile_lock(model, plain), under_compile_lock(compiled(copy.deepcopy(module)), plain))
    assert same(frozen(model, plain), under_compile_lock(compiled(copy.deepcopy(module)), plain))


@pytest.mark.slow
def test_modes_are_looked_at() -> None:
    model = compiled(dit())
    given = noise(0, 2), torch.full((2,), 900.0), torch.tensor([1, 2])
    with moeca.trajectory(model, frozen=True):
        with torch.no_grad():
            model(*given)
            model(*given)
        with torch.inference_mode():
            assert model(*given).is_inference()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(*given).dtype == torch.bfloat16
        module = model._orig_mod.requires_grad_(True)
        with pytest.raises(StateError, match="moeca is for inference"):
            model(*given)
        module.requires_grad_(False)


def test_warmup_explain_and_reset_inside(model: nn.Module) -> None:
    truth = under_compile_lock(model, plain)
    given = noise(0, 2), torch.full((2,), 900.0), torch.tensor([1, 2])
    with moeca.trajectory(model, frozen=True):
        assert same(under_compile_lock(model, plain), truth)
        count = len(records(model))
        with torch.no_grad():
            moeca.warmup(model, *given)
        assert len(records(model)) == count, "a look is no step"
        assert len(moeca.explain(model, *given).regions)
        moeca.reset(model)
        assert same(under_compile_lock(model, plain), truth)


@pytest.mark.slow
def test_another_model_inside_and_calls_outside_have_no_shortcut() -> None:
    one, other = compiled(dit(0)), compiled(dit(1))
    truth = under_compile_lock(other, plain)
    ways = Ways(one), Ways(other)
    with pytest.warns(MoecaWarning, match="no call of the compiled model"), moeca.trajectory(one, frozen=True):
        assert same(under_compile_lock(other, plain), truth)
    assert ways[1].count == len(truth)
    under_compile_lock(one, plain)
    assert ways[0].count == len(truth)


def test_threads_have_their_own(model: nn.Module) -> None:
    truth, found = under_compile_lock(model, plain), dict[int, list[Tensor]]()

    def work(i: int) -> None:
        with moeca.trajectory(model, frozen=True):
            found[i] = run(plain(model))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert all(same(found[i], truth) for i in range(3))


@pytest.mark.parametrize("what", [lambda x: x, nn.Linear(2, 2)])
def test_what_is_no_compiled_module_is_refused(what: Any) -> None:
    with pytest.raises(StateError, match=r"trajectory\(frozen=True\) wants the compiled module itself, and got"):
        moeca.trajectory(what, frozen=True)
