"""Requests at different steps share calls of a compiled model, and each gets bit for bit what it gets alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.engine.batched.forms import needs_of
from moeca_compile.errors import LoweringError, MoecaWarning, OptionError, StateError
from moeca_compile.frontend.batched.model import BatchedModel, _refuse
from moeca_compile.ops.even_rows import even_rows
from moeca_compile.options import Options
from tests.bundle.conftest import ADAPTIVE
from tests.bundle.test_partial import BY_DRIFT
from tests.models import DiT

BUDGET = 2**20
STEPS = 6
EXAMPLE = (torch.ones(2, 2, 4, 4), torch.tensor([900.0, 100.0]), torch.tensor([1, 2]))
Loop = Generator[Any, Any, Tensor]


class Tiny(nn.Module):
    """One block of attention and MLP, modulated by time and label."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.label = nn.Linear(2, 16), nn.Linear(1, 16), nn.Embedding(4, 16)
        self.qkv, self.proj, self.out = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 2)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x.flatten(2).transpose(1, 2))
        c = (self.time(t[:, None] / 1000) + self.label(y))[:, None]
        q, k, v = self.qkv(h * (1 + c)).view(*h.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + c * self.down(F.gelu(self.up(h * (1 + c))))
        return self.out(h).transpose(1, 2).reshape(x.shape)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(one_thread: None) -> Any:
    return moeca.compile(tiny(), schedule="uniform:3", inner="eager")


@pytest.fixture(scope="module")
def batched(model: Any) -> BatchedModel:
    return moeca.BatchedModel(model, EXAMPLE, BUDGET, 4)


def sampler(seed: int, batch: int = 1, steps: int = STEPS) -> Loop:
    """Euler steps of one request, with timesteps and labels of its own."""
    x = torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    y = (torch.arange(batch) + seed) % 4
    for step in range(steps):
        out = yield x, torch.full((batch,), 1000.0 - 7 * seed - 80 * step), y
        x = x - out / steps
    return x


def alone(batched: BatchedModel, loop: Loop) -> Tensor:
    request = batched.submit(loop)
    batched.run()
    return request.result()


def drive(loop: Loop, call: Callable[[Any], Any]) -> Tensor:
    try:
        inputs = next(loop)
        while True:
            inputs = loop.send(call(inputs))
    except StopIteration as end:
        return end.value


def test_requests_at_different_steps_get_what_they_get_alone(batched: BatchedModel) -> None:
    """At random offsets, with batches of 1 to 3."""
    dice = random.Random(0)
    batches = [dice.choice((1, 1, 2, 3)) for _ in range(12)]
    expected = [alone(batched, sampler(seed, batch)) for seed, batch in enumerate(batches)]
    batched.calls.clear()
    requests = []
    for seed, batch in enumerate(batches):
        requests.append(batched.submit(sampler(seed, batch), steps=STEPS, stream=f"request {seed}"))
        for _ in range(dice.randrange(3)):
            batched.step()
    batched.run()
    for request, one in zip(requests, expected, strict=True):
        assert torch.equal(request.result(), one)
    assert batched.pool.free == batched.pool.lanes
    assert sum(record.requests for record in batched.calls) == len(batches) * STEPS
    assert len(batched.calls) < 0.7 * len(batches) * STEPS
    assert [record.variant for record in requests[0].trajectory.records] == ["v0", "v1", "v1"] * 2


def test_a_request_gets_what_the_compiled_model_gives_at_the_same_batch(model: Any, batched: BatchedModel) -> None:
    most = batched.batches[-1]

    def call(inputs: Any) -> Tensor:
        return model(*(value.expand(most, *value.shape[1:]).contiguous() for value in inputs))[:1]

    for seed in range(3):
        with torch.no_grad(), even_rows(), moeca.trajectory(model, stream="one"):
            expected = drive(sampler(seed), call)
        requests = [batched.submit(sampler(other)) for other in (seed, 5, 6, 7)]
        batched.run()
        assert torch.equal(requests[0].result(), expected)


def test_threads_share_calls_and_stats_tell_them(model: Any, batched: BatchedModel) -> None:
    expected = [alone(batched, sampler(seed)) for seed in range(4)]
    moeca.reset(model)
    batched.calls.clear()
    begin, results = threading.Barrier(4), {}

    def draw(seed: int) -> None:
        torch.set_num_threads(1)
        with batched.trajectory(steps=STEPS) as trajectory:
            begin.wait(30)
            results[seed] = drive(sampler(seed), trajectory.run)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))
    assert len(batched.calls) < 4 * STEPS
    assert len(moeca.stats(model).steps) == 4 * STEPS


def test_requests_wait_for_room_in_their_order_and_memory_is_as_told(model: Any) -> None:
    needs = needs_of(moeca.BatchedModel(model, EXAMPLE, BUDGET, 1).forms.home, sum(one[:1].nbytes for one in EXAMPLE))
    batched = moeca.BatchedModel(model, EXAMPLE, 2 * needs.lane + 2 * needs.call, 2)
    assert batched.pool.lanes == 2
    requests = [batched.submit(sampler(seed, batch)) for seed, batch in enumerate((1, 2, 1))]
    ends: list[int] = []
    while batched.step():
        held = moeca.stats(model)
        assert held.state_bytes + held.hoisted_bytes <= 2 * needs.lane
        ends += [seed for seed, request in enumerate(requests) if request.done and seed not in ends]
    assert ends == [0, 1, 2]
    assert torch.equal(requests[1].result(), alone(batched, sampler(1, 2)))


def test_changed_weights_make_every_request_cold(model: Any, batched: BatchedModel) -> None:
    weight = model._orig_mod.out.weight
    before = weight.detach().clone()

    @torch.no_grad()
    def change(to: Tensor) -> None:
        weight.copy_(to)

    def run(seeds: list[int]) -> list[Tensor]:
        requests = [batched.submit(sampler(seed)) for seed in seeds]
        for _ in range(2):  # steps of all
            batched.step()
        change(before * 1.5)
        batched.run()
        change(before)
        colds = [[record.cold for record in request.trajectory.records] for request in requests]
        assert all(cold == [False, False, True, False, False, False] for cold in colds)
        return [request.result() for request in requests]

    expected = [run([seed])[0] for seed in range(3)]
    assert all(map(torch.equal, run([0, 1, 2]), expected))


def test_other_conditioning_in_a_request_is_seen(batched: BatchedModel) -> None:
    """Hoisted values follow the inputs that they came from."""

    def turning(y: int) -> Loop:
        x = torch.ones(1, 2, 4, 4)
        for step in range(4):
            x = x - (yield x, torch.tensor([900.0 - step]), torch.tensor([1 if step < 1 else y]))
        return x

    expected = {y: alone(batched, turning(y)) for y in (1, 3)}
    assert not torch.equal(expected[1], expected[3])
    requests = {y: batched.submit(turning(y)) for y in (1, 3)}
    batched.run()
    assert all(torch.equal(requests[y].result(), expected[y]) for y in (1, 3))


def test_an_error_of_one_request_is_its_own(batched: BatchedModel) -> None:
    def broken() -> Loop:
        yield EXAMPLE
        raise ZeroDivisionError("in the sampler")

    def stubborn() -> Loop:
        yield EXAMPLE
        with pytest.raises(StateError, match="has room for batch 2, this call has 1"):
            yield tuple(value[:1] for value in EXAMPLE)
        return (yield EXAMPLE)

    expected = alone(batched, sampler(0))
    good, bad, again = batched.submit(sampler(0)), batched.submit(broken()), batched.submit(stubborn(), steps=2)
    long = batched.submit(sampler(1), steps=2)
    batched.run()
    assert torch.equal(good.result(), expected)
    with pytest.raises(ZeroDivisionError):
        bad.result()
    with pytest.raises(StateError, match="steps=2, and this is call 3"):
        long.result()
    assert again.result().shape == (2, 2, 4, 4)
    assert batched.pool.free == batched.pool.lanes


def test_a_failing_call_is_told_to_its_requests(batched: BatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = batched.submit(sampler(0))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("moeca_compile.frontend.batched.model.run_together", fail)
    batched.run()
    with pytest.raises(RuntimeError, match="out of memory"):
        request.result()
    assert batched.pool.free == batched.pool.lanes


def changed(**values: Any) -> Mapping[str, Any]:
    return dict(zip("xty", EXAMPLE, strict=True)) | values


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (EXAMPLE[:2], "another form than the example"),
        (changed(), "another form than the example"),
        ((EXAMPLE[0].double(), *EXAMPLE[1:]), r"\[0\] is float64 .*, and float32 .* in the example"),
        ((EXAMPLE[0][..., :2], *EXAMPLE[1:]), r"\['batch', 2, 4, 2\] on cpu, and"),
        ((EXAMPLE[0][:1], *EXAMPLE[1:]), r"have batches \[1, 2\]"),
        (tuple(torch.cat([value] * 3) for value in EXAMPLE), "6 samples, and a call takes 4"),
    ],
)
def test_bad_inputs(batched: BatchedModel, inputs: Any, says: str) -> None:
    def loop() -> Loop:
        yield inputs
        return torch.ones(())

    with pytest.raises(StateError, match=says):
        batched.submit(loop())
    assert batched.pool.free == batched.pool.lanes


def test_bad_use(batched: BatchedModel) -> None:
    with pytest.raises(OptionError, match="expected a generator"):
        batched.submit(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="steps=0"):
        batched.trajectory(steps=0)
    with batched.trajectory() as trajectory:
        trajectory.run(EXAMPLE)
    with pytest.raises(StateError, match="was closed"):
        trajectory.run(EXAMPLE)
    with pytest.raises(StateError, match="was closed"), trajectory:
        pass


def test_what_cannot_be_opened(model: Any) -> None:
    with pytest.raises(StateError, match="isn't compiled with moeca"):
        moeca.BatchedModel(tiny(), EXAMPLE, BUDGET)
    with pytest.raises(StateError, match="give at least"):
        moeca.BatchedModel(model, EXAMPLE, 100)
    with pytest.raises(OptionError, match="expected a whole number from 1 on"):
        moeca.BatchedModel(model, EXAMPLE, 0)
    with pytest.raises(OptionError, match="keeps programs for 8 sizes"):
        moeca.BatchedModel(model, EXAMPLE, 2**24, 1000)
    with pytest.raises(LoweringError, match="no tensor with a batch"):
        moeca.BatchedModel(model, (1.0,), BUDGET)
    for options in ({"granularity": "output"}, {"cuda_graphs": True}, {"free_hoisted": True}):
        with pytest.raises(StateError, match=f"BatchedModel: {next(iter(options))}.*without it"):
            _refuse(Options(**options))


class Touching(nn.Module):
    """Its samples know each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, y) * x.mean()


class Broken(Touching):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.inner(x, t, y)
        torch._dynamo.graph_break()
        return self.inner(x, t, y)


@pytest.mark.slow
def test_models_whose_requests_cannot_share_a_call(one_thread: None) -> None:
    touching = moeca.compile(Touching().eval(), schedule="uniform:3", inner="eager")
    with pytest.raises(StateError, match="other bits beside other samples"):
        moeca.BatchedModel(touching, EXAMPLE, BUDGET, 2)
    assert moeca.BatchedModel(touching, EXAMPLE, BUDGET, 2, exact=False).batches == (1, 2)
    broken = moeca.compile(Broken().eval(), inner="eager")
    with pytest.warns(MoecaWarning, match="graph break"), pytest.raises(StateError, match="ran 0 graphs in one call"):
        moeca.BatchedModel(broken, EXAMPLE, BUDGET, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": ADAPTIVE}, {"schedule": BY_DRIFT}, {"inner": "inductor"}],
    ids=["uniform", "adaptive", "drift", "inductor"],
)
def test_mixture_of_experts(options: dict[str, Any], one_thread: None) -> None:
    torch.manual_seed(0)
    net = DiT(depth=1, dim=16, heads=2, num_experts=3, top_k=2, hidden=12, size=4, channels=2).eval()
    batched = moeca.BatchedModel(
        moeca.compile(net, **{"schedule": "uniform:3", "inner": "eager"} | options), EXAMPLE, BUDGET, 4
    )
    batches = [1 + seed % 2 for seed in range(8)]
    expected = [alone(batched, sampler(seed, batch, 9)) for seed, batch in enumerate(batches)]
    batched.calls.clear()
    requests = []
    for seed, batch in enumerate(batches):
        requests.append(batched.submit(sampler(seed, batch, 9)))
        batched.step()
    batched.run()
    assert all(torch.equal(request.result(), one) for request, one in zip(requests, expected, strict=True))
    assert len({record.variant for record in batched.calls}) > 1
    assert len(batched.calls) < 8 * 9
