"""PARTIAL rows against the oracle, step by step, in float64: branches, tokens, keys and values, what is chosen.

Routers are made to flip: latents move far from step to step, and one test turns the order of the slots at random.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.graph.fx import is_experts, shape
from moeca_compile.schedule import Control, Partial, Schedule
from tests.following import Runner, Subject, subject_of
from tests.models import STYLES, DiT, NumpyMoE
from tests.reference import Reference
from tests.tools import ops, schedule_of

NO_DEADLINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEGEND = {
    "a": Partial(0.25, 0.25),
    "b": Partial(0, 0.2),
    "c": Partial(0.5, 0),
    "d": Partial(0, 0),
    "e": Partial(1, 0),
    "f": Partial(0.01, 1),
}
WILD, TAME = 1.5, 0.1


def inputs(step: int, speed: float, tokens: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    size = 2 * int(tokens**0.5)
    x, drift = (torch.randn(2, 2, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.tensor(speed * step).cos() + drift * torch.tensor(speed * step).sin()
    return {"x": x, "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@cache
def subject(style: str = "numpy", top_k: int = 2, speed: float = WILD, shared: bool = True, depth: int = 2) -> Subject:
    torch.manual_seed(0)
    style, _, kind = style.partition(" ")
    model = DiT(
        style=style,
        depth=depth,
        dim=16,
        heads=2,
        num_experts=5,
        top_k=top_k,
        hidden=12,
        size=4,
        channels=2,
        shared=shared,
    )
    for block in model.blocks:
        with torch.no_grad():
            if kind == "one expert for all":
                block.moe.router.weight.copy_(torch.linspace(1, 0, 5)[:, None] * 1e-3 * block.moe.router.weight[:1])
            elif kind:
                block.moe.router.weight[3] = 0.0
                block.moe.router.weight[:3].mul_(4)
    model = model.double().eval().requires_grad_(False)
    moeca.prepare(model)
    return subject_of(model, partial(inputs, speed=speed))


def follow(one: Subject, schedule: Schedule) -> int:
    """Run the schedule's rows beside the oracle; how many transitions there were."""
    runner, oracle = Runner(one, schedule), Reference(one.captured.gm, one.facts.regions, schedule)
    runner.start()
    flips, last = 0, None
    for step, row in enumerate(schedule.rows):
        args = one.call(step)
        (found,), (wanted,) = runner(row, args), oracle(row, args)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, step=step: f"{step}: {text}")
        ids = next(oracle.env[n.args[1]] for n in one.captured.gm.graph.nodes if is_experts(n)).sort(dim=1).values
        flips += 0 if last is None else int((ids != last).any(dim=1).sum())
        last = ids
    return flips


@st.composite
def schedules(draw: st.DrawFn, one: Subject) -> Schedule:
    order = draw(st.integers(0, 2))
    letters = "".join(LEGEND) + ("CRF" if order else "CR")
    rows = draw(st.lists(st.text(letters, min_size=2, max_size=2), min_size=1, max_size=5))
    score = draw(st.sampled_from(["drift", "error"]))
    moe = ["blocks.0.moe"]
    weights = st.lists(st.floats(0.1, 4), min_size=5, max_size=5).map(tuple)
    sensitivity = draw(st.dictionaries(st.sampled_from(moe), weights))
    threshold = draw(st.dictionaries(st.sampled_from(moe), st.lists(st.floats(0, 2), min_size=5, max_size=5)))
    quota = draw(st.dictionaries(st.sampled_from(moe), st.sampled_from([(0.2,) * 5, (0.6, 0.4, 0.0, 0.0, 0.0)])))
    control = Control(score, sensitivity, threshold, quota)
    return schedule_of(one.analysis, "CC", *rows, order=order, legend=LEGEND, control=control)


SLOW = pytest.mark.slow  # the other styles and speeds


@pytest.mark.parametrize(
    ("style", "speed"),
    [
        ("numpy", WILD),
        pytest.param("nonzero", TAME, marks=SLOW),
        pytest.param("numpy", TAME, marks=SLOW),
        pytest.param("nonzero", WILD, marks=SLOW),
    ],
)
@settings(NO_DEADLINE, max_examples=5)
@given(data=st.data())
def test_any_partial_schedule_is_run_as_the_oracle_says(style: str, speed: float, data: st.DataObject) -> None:
    one = subject(style, speed=speed, depth=1)
    follow(one, data.draw(schedules(one)))


@pytest.mark.parametrize("score", ["drift", "error"])
def test_the_control_s_numbers_are_real_tables_of_the_program(score: str) -> None:
    one = subject(depth=1)
    weights, limits, shares = (1.0, 2.0, 0.5, 4.0, 1.0), (0.1, 0.5, 0.0, 9.0, 0.3), (0.2,) * 5
    control = Control(score, *({"blocks.0.moe": table} for table in (weights, limits, shares)))
    schedule = schedule_of(one.analysis, "CC", "Fa", "aF", "bb", legend=LEGEND, control=control)
    follow(one, schedule)
    variant = Runner(one, schedule).variant(schedule.rows[1])[0]
    tables = list(variant.gm.buffers())
    assert [tuple(table.shape) for table in tables] == [(5,)] * 4, "two of weights, one of thresholds, one of quotas"
    assert all(type(table) is Tensor for table in tables), "not fake ones"


def run(one: Subject, schedule: Schedule) -> list[Tensor]:
    """The outputs of the schedule's rows, one step each."""
    runner = Runner(one, schedule)
    runner.start()
    return [runner(row, one.call(step))[0] for step, row in enumerate(schedule.rows)]


def test_routers_did_flip() -> None:
    """What the properties above rest on: at the wild speed most tokens change an expert at some step."""
    one = subject()
    assert follow(one, schedule_of(one.analysis, "CCCC", *["FbFb"] * 5, legend=LEGEND)) > 15


@pytest.mark.parametrize("score", ["drift", "error"])
def test_all_tokens_recomputed_is_all_computed(score: str) -> None:
    one = subject()
    schedule = schedule_of(one.analysis, "CCCC", "eeee", "eeee", legend=LEGEND, control=Control(score))
    for step, found in enumerate(run(one, schedule)):
        torch.testing.assert_close(found, one.eager(step), rtol=1e-9, atol=1e-9)


class Shuffled(NumpyMoE):
    """The same routing in an order that changes with every token and step."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        order = x[:, : self.top_k].argsort(dim=1)
        return ids.gather(1, order), weights.gather(1, order)


@SLOW
@pytest.mark.parametrize(("row", "top_k"), [("FbFb", 1), ("aaaa", 2), ("Fdcf", 3)])
def test_the_order_of_a_token_s_experts_means_nothing(row: str, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLES, "shuffled", Shuffled)
    plain, shuffled = subject("numpy", top_k), subject("shuffled", top_k)
    text = ("CCCC", row, "FbFb", row, "CCCC", row)
    left, right = (run(one, schedule_of(one.analysis, *text, legend=LEGEND)) for one in (plain, shuffled))
    assert any((a - plain.eager(step)).abs().max() > 1e-3 for step, a in enumerate(left)), "nothing was cached"
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_token_whose_expert_is_named_twice() -> None:
    """A router may repeat itself; each of its entries is a branch."""

    class Repeating(NumpyMoE):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            ids, weights = super().route(x)
            return torch.where(x[:, :1] > 0, ids, ids[:, :1]), weights

    STYLES["repeating"] = Repeating
    try:
        one = subject("repeating")
        follow(one, schedule_of(one.analysis, "CCCC", "FbFb", "FfFf", "dbda", "CCCC", "FbFb", legend=LEGEND))
    finally:
        del STYLES["repeating"]


@SLOW
@pytest.mark.parametrize("kind", ["one expert for all", "an expert that nobody picks"])
def test_lopsided_routers(kind: str) -> None:
    one = subject(f"numpy {kind}")
    follow(one, schedule_of(one.analysis, "CCCC", "FbFb", "aaaa", "Fdfd", "CCCC", "FbFb", legend=LEGEND))


@pytest.mark.slow
def test_without_shared_experts() -> None:
    one = subject(shared=False)
    follow(one, schedule_of(one.analysis, "CCCC", "FbFb", "aaaa", "CdCd", legend=LEGEND))


@pytest.mark.slow
def test_a_sample_doesn_t_depend_on_its_neighbours() -> None:
    """Which tokens and branches are computed is decided for each sample by itself."""
    both = subject(depth=1)
    alone = [
        subject_of(both.model, lambda step, i=i: {k: v[i : i + 1] for k, v in inputs(step, WILD).items()})
        for i in (0, 1)
    ]
    text = ("CC", "aa", "Fb", "af")
    together = run(both, schedule_of(both.analysis, *text, legend=LEGEND))
    for i, one in enumerate(alone):
        for a, b in zip(together, run(one, schedule_of(one.analysis, *text, legend=LEGEND)), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-9, atol=1e-9)


def test_what_a_row_computes_is_what_its_program_holds() -> None:
    one = subject()
    schedule = schedule_of(one.analysis, "CCCC", "FbFb", "dddd", "cccc", legend=LEGEND)
    runner = Runner(one, schedule)
    full, branches, nothing, tokens = (runner.variant(row)[0] for row in schedule.rows)
    experts, attention = "moeca.experts.default", "aten.scaled_dot_product_attention.default"
    assert (ops(full.gm)[experts], ops(full.gm)[attention]) == (2, 2)
    assert (ops(branches.gm)[experts], ops(branches.gm)[attention]) == (2, 0)
    assert (ops(nothing.gm)[experts], ops(nothing.gm)[attention], nothing.writes) == (0, 0, ())
    assert (ops(tokens.gm)[experts], ops(tokens.gm)[attention]) == (2, 2)
    for node in branches.gm.graph.nodes:
        if is_experts(node):
            assert shape(node) == (2 * 2, 1, 16), "tau 0.2 of 4 tokens x 2 branches, two samples, one row a branch"
    for node in tokens.gm.graph.nodes:
        if is_experts(node):
            assert shape(node) == (2 * 2 * 2, 1, 16), "half of 4 tokens, both branches, two samples"
        if str(node.target) == attention:
            assert shape(node)[2] == 2, "half of the queries"
            assert shape(node.args[1])[2] == 4, "all keys"


@pytest.mark.slow
def test_compiled_as_interpreted() -> None:
    """Inductor's programs, in float32, through the dispatcher."""
    torch.manual_seed(0)
    model = DiT(depth=1, dim=16, heads=2, num_experts=5, top_k=2, hidden=12, size=4, channels=2).eval()
    model.requires_grad_(False)
    schedule = schedule_of(subject(depth=1).analysis, "CC", "Fb", "aa", "Fb", legend=LEGEND)
    outputs = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = moeca.compile(model, schedule=schedule, inner=inner)
        calls = [{k: v.float() if k != "y" else v for k, v in inputs(i, TAME).items()} for i in range(4)]
        moeca.warmup(compiled, **calls[0])  # from a state that was never written, whose slots share tensors
        with torch.no_grad(), moeca.trajectory(compiled, steps=4):
            steps = [compiled(**call) for call in calls]
        outputs.append(steps)
        assert moeca.stats(compiled).graphs == 1
    for left, right in zip(*outputs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
