"""Programs that change kept branches in place: what they hold, which rows they are for, and that they give the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.engine.compiled_schedule import CompiledSchedule
from moeca_compile.errors import LoweringError
from moeca_compile.graph import fx
from moeca_compile.graph.variant import Slot, Variant
from moeca_compile.lowering.inductor.equal_blocks import runs
from moeca_compile.lowering.inductor.lower import Executable, lower_eager
from moeca_compile.lowering.inductor.weight_addresses import weight_addresses, with_addresses
from moeca_compile.options import Options
from moeca_compile.passes.partial import branches_in_place
from moeca_compile.pipeline import build_variant
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Control, Partial, Row, Schedule
from tests.following import Runner, Subject, subject_of
from tests.models import DiT
from tests.tools import UNHOISTED, layout_of, ops, schedule_of

LEGEND = {"b": Partial(0, 0.2), "d": Partial(0, 0), "f": Partial(0, 1), "a": Partial(0.25, 0.25)}
FORECAST = "moeca.forecast_branches.default"
BRANCHES, KEEP, EXPERTS = "moeca.branches_.default", "moeca.keep_branches_.default", "moeca.experts.default"
AT_ADDRESSES = "moeca.branches_.at"
TOP_K, SORTING = "moeca.top_k.default", "aten.topk.default"


def inputs(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, drift = (torch.randn(2, 2, 4, 4, generator=generator) for _ in range(2))
    now = torch.tensor(1.5 * step)
    return {"x": x * now.cos() + drift * now.sin(), "t": torch.full((2,), 900.0 - 40 * step), "y": torch.tensor([1, 5])}


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    sizes = {"depth": 2, "dim": 16, "heads": 2, "num_experts": 5, "top_k": 2, "hidden": 12, "size": 4, "channels": 2}
    model = DiT(style="numpy", shared=True, **sizes).eval().requires_grad_(False)
    moeca.prepare(model)
    return subject_of(model, inputs)


def in_place(one: Subject, schedule: Schedule, wanted: Row) -> Variant:
    return build_variant(one.analysis, schedule, wanted, Options(disable=UNHOISTED), "v")[0]


class InPlace(Runner):
    """Runs the same rows by programs that change their branches in place, operator by operator."""

    def variant(self, wanted: Row) -> tuple[Variant, Executable]:
        if wanted not in self.built:
            variant = in_place(self.one, self.schedule, wanted)
            self.built[wanted] = variant, lower_eager(variant)
        return self.built[wanted]

    def __call__(self, wanted: Row, args: Sequence[object]) -> tuple[Tensor, ...]:
        CompiledSchedule._own(self, self.state, self.variant(wanted)[0].changes)  # type: ignore[arg-type]
        return super().__call__(wanted, args)


def test_what_the_programs_hold(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches_in_place, "library", object)
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", "FdFF", "aaaa", legend=LEGEND)
    full, some, none, tokens = (in_place(subject, schedule, row) for row in schedule.rows)
    layout = layout_of(subject.analysis, schedule)
    held = {number for number, slot in enumerate(layout) if slot.slot is Slot.HELD}
    routed = {n for n, slot in enumerate(layout) if (slot.region, slot.output) in {(1, 0), (3, 0)}}
    assert held < routed
    assert (ops(full.gm)[EXPERTS], ops(full.gm)[KEEP], ops(full.gm)[BRANCHES]) == (2, 2, 0)
    assert (ops(some.gm)[EXPERTS], ops(some.gm)[KEEP], ops(some.gm)[BRANCHES]) == (0, 0, 2)
    assert (ops(none.gm)[EXPERTS], ops(none.gm)[KEEP], ops(none.gm)[BRANCHES], ops(none.gm)[FORECAST]) == (0, 0, 0, 2)
    assert not any(fx.has_effect(node) for node in none.gm.graph.nodes if node.op == "call_function"), "nor changed"
    assert [ops(one.gm)[TOP_K] for one in (full, some, none, tokens)] == [0, 2, 2, 0]
    assert [ops(one.gm)[SORTING] for one in (full, some, none)] == [2, 0, 0]
    assert set(full.changes) == set(some.changes) == routed
    assert not routed & {*full.writes, *some.writes}
    assert (none.changes, none.writes) == ((), ()), "nothing is computed"
    assert ops(tokens.gm)[EXPERTS] == 2, "a row with chosen tokens is written out"
    assert tokens.changes == ()
    assert some.macs == build_variant(subject.analysis, schedule, schedule.rows[1], Options(inner="eager"), "v")[0].macs


def test_bodies_of_equal_blocks_hold_no_writes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches_in_place, "library", object)
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", legend=LEGEND)
    variant = in_place(subject, schedule, schedule.rows[1])
    inside = [str(node.target) for run in runs(variant.gm) for node in run.nodes]
    assert inside
    assert BRANCHES not in inside


def test_inductor_gets_the_addresses_of_the_weights(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches_in_place, "library", object)
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", legend=LEGEND)
    variant = in_place(subject, schedule, schedule.rows[1])
    gm = weight_addresses(fx.copied(variant.gm), variant)
    gm.graph.lint()
    assert (ops(gm)[BRANCHES], ops(gm)[AT_ADDRESSES]) == (0, 2)
    ends = fx.placeholders(variant.gm)
    args = [torch.zeros(fx.shape(end), dtype=fx.need(end).dtype) for end in ends]
    lies_at = {end: arg.data_ptr() for end, arg in zip(ends, args, strict=True)}
    layers = [list(fx.nodes_of(one.args[18:24])) for one in variant.gm.graph.nodes if str(one.target) == BRANCHES]
    replaced = with_addresses(gm)
    given = replaced(args)
    for table, weights in zip(given[-2:], layers, strict=True):  # up and down of 5 experts, and biases
        assert [at for at in table.tolist() if at] == [lies_at[weight] for weight in weights]
        assert table.shape == (30,)
    names = [end.name for end in fx.placeholders(gm)]
    assert len(names) == len(given) == len(args) - sum(map(len, layers)) + 2
    assert not {weight.name for layer in layers for weight in layer} & set(names)
    assert [id(one) for one in replaced(args)] == [id(one) for one in given], "tables are made once"
    place = ends.index(layers[1][0])
    args[place] = torch.ones(12, 16)
    assert replaced(args)[-1][0] == args[place].data_ptr(), "another weight lies elsewhere"
    args[place] = torch.ones(16, 12).t()
    with pytest.raises(LoweringError, match="isn't contiguous float32"):
        replaced(args)


def test_weights_of_other_kinds_stay_what_they_are(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches_in_place, "library", object)
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", legend=LEGEND)
    variant = in_place(subject, schedule, schedule.rows[1])
    gm = fx.copied(variant.gm)
    first = next(node for node in gm.graph.nodes if str(node.target) == BRANCHES)
    weight = next(fx.nodes_of(first.args[18]))
    weight.meta["val"] = fx.need(weight).to(torch.bfloat16)
    assert (ops(weight_addresses(gm, variant))[BRANCHES], ops(gm)[AT_ADDRESSES]) == (1, 1)
    full = in_place(subject, schedule, schedule.rows[0])
    untouched = weight_addresses(fx.copied(full.gm), full)
    assert with_addresses(untouched)([1, 2]) == [1, 2]


@pytest.mark.parametrize("why", ["eager", "no compiler", "float64"])
def test_rows_that_are_written_out(subject: Subject, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches_in_place, "library", (lambda: None) if why == "no compiler" else object)
    if why == "float64":
        monkeypatch.setattr(branches_in_place, "DTYPES", {torch.bfloat16: "bfloat16"})
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", legend=LEGEND)
    options = Options(inner="eager" if why == "eager" else "inductor", disable=UNHOISTED)
    variant = build_variant(subject.analysis, schedule, schedule.rows[1], options, "v")[0]
    assert (ops(variant.gm)[BRANCHES], ops(variant.gm)[EXPERTS], variant.changes) == (0, 2, ())


def test_state_that_is_changed_in_place_is_nobody_else_s(subject: Subject) -> None:
    schedule = schedule_of(subject.analysis, "CCCC", "FbFb", legend=LEGEND)
    runner = Runner(subject, schedule)
    state = StreamState(runner.layout, 4)
    shared = torch.ones(2)
    state.tensors[0] = state.tensors[1] = shared
    CompiledSchedule._own(runner, state, (0, 1, 2))  # type: ignore[arg-type]
    assert state.tensors[0] is shared
    assert state.tensors[1] is not shared
    assert torch.equal(state.tensors[1], shared)
    assert not state.tensors[2].any(), "what was never written is zeros"


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("score", ["drift", "error"])
@pytest.mark.parametrize("kept", ["exact", "bfloat16"])
def test_they_give_what_the_written_out_programs_give(subject: Subject, order: int, score: str, kept: str) -> None:
    text = (
        ("CCCC", "FbFb", "RdFf", "CbFb", "aaaa", "FbFb", "CCCC", "FdCb") if order else ("CCCC", "RbRb", "RdRf", "CbRb")
    )
    weights, thresholds = (1.0, 2.0, 0.5, 4.0, 1.0), (0.1, 0.5, 0.0, 9.0, 0.3)
    control = Control(score, {"blocks.0.moe": weights}, {"blocks.0.moe": thresholds}, kept=kept)
    schedule = schedule_of(subject.analysis, *text, order=order, legend=LEGEND, control=control)
    runners = Runner(subject, schedule), InPlace(subject, schedule)
    for runner in runners:
        runner.start()
    for step, row in enumerate(schedule.rows):
        left, right = (runner(row, subject.call(step))[0] for runner in runners)
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if kept == "exact" else {"rtol": 0.01, "atol": 1e-3}
        )  # a tie may round apart
        torch.testing.assert_close(left, right, **close, msg=lambda text, step=step: f"{step}: {text}")


def test_branches_that_are_kept_in_16_bits(subject: Subject) -> None:
    """Half of the bytes; what is computed goes unrounded into the result; the rest is rounded once."""
    text = ("CCCC", "CCCC", "FbFb", "aaaa")
    exact, narrow = (
        schedule_of(subject.analysis, *text, order=2, legend=LEGEND, control=Control(kept=kept))
        for kept in ("exact", "bfloat16")
    )
    wide, half = layout_of(subject.analysis, exact), layout_of(subject.analysis, narrow)
    for one, other in zip(wide, half, strict=True):
        is_branch = one.output == 0 and one.region in (1, 3) and one.slot in (Slot.Y, Slot.D1, Slot.D2)
        assert (other.dtype, other.bytes) == (("bfloat16", one.bytes // 2) if is_branch else (one.dtype, one.bytes))
    runners = Runner(subject, exact), Runner(subject, narrow)
    for runner in runners:
        runner.start()
    for step, row in enumerate(exact.rows):
        left, right = (runner(row, subject.call(step))[0] for runner in runners)
        if step < 2:
            assert torch.equal(left, right)
        else:
            assert 0 < (left - right).abs().max() < 0.01 * left.abs().max(), step
