"""Variants that are recorded and replayed, with state that stays where it is; the recorder here needs no GPU.

It runs what was recorded again on the recording's own arguments and writes over the recording's own results, as a CUDA
graph does: whoever hands over other tensors, or keeps what a replay gave, is found out.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, OptionError
from moeca_compile.graph.variant import Slot, StateSlot
from moeca_compile.lowering.inductor import replay
from moeca_compile.lowering.inductor.buffers import Buffers, copy_all
from moeca_compile.runtime.state import StreamState
from moeca_compile.schedule import Action, Partial, Schedule
from tests.sampling import (
    Loop,
    cfg_batched,
    cfg_calls,
    compiled,
    dit,
    in_place,
    plain,
    run,
    same,
    streams,
    take_turns,
    under_compile_lock,
)  # fmt: skip

C, F = Action.COMPUTE, Action.FORECAST
LOOPS: dict[str, Callable[[Any], Loop]] = {
    "plain": plain, "in place": in_place, "cfg": cfg_batched, "cfg in two calls": cfg_calls,
}  # fmt: skip
INPUTS = (torch.zeros(2, 4, 8, 8), torch.full((2,), 500.0), torch.zeros(2, dtype=torch.long))
SCHEDULES = {"copies": {"order": 0}, "lines": {}, "parabolas": {"order": 2}, "adaptive": {"schedule": "adaptive:0.05"}}


class Recorder:
    """`record`, and how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def record(self, run: replay.Run, args: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
        self.count += 1
        results = [one.clone() for one in run(args)]

        def again() -> None:
            for kept, new in zip(results, run(args), strict=True):
                kept.copy_(new)

        for one in results:
            one.fill_(float("nan") if one.is_floating_point() else 99)  # what recording gave is nobody's
        return again, results


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(replay.RECORDERS, "cpu", made.record)
    return made


def both(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The same model, replayed and not."""
    torch._dynamo.reset()
    return compiled(dit(), cuda_graphs=True, **options), compiled(dit(), **options)


@pytest.mark.parametrize(
    "kind", ["lines", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("adaptive", "copies", "parabolas"))]
)
def test_replays_give_the_same_bits(recorder: Recorder, kind: str) -> None:
    replayed, called = both(**SCHEDULES[kind])
    for name, loop in LOOPS.items():
        assert same(under_compile_lock(replayed, loop), under_compile_lock(called, loop)), name
    assert recorder.count


@pytest.mark.slow
def test_rows_that_compute_a_part(recorder: Recorder) -> None:
    keys = tuple(region.key for region in moeca.explain(dit(), *INPUTS, inner="eager").regions)
    rows = ((C, C), (F, Partial(0, 0.2)), (Partial(0.25), Partial(0.25)))
    replayed, called = both(schedule=Schedule(rows, keys, period=3))
    assert same(under_compile_lock(replayed, plain), under_compile_lock(called, plain))
    assert recorder.count == 4


def test_nothing_is_recorded_twice(recorder: Recorder) -> None:
    """The next trajectory finds its state where the last one had it."""
    replayed, _ = both()
    for _ in range(3):
        under_compile_lock(replayed, plain)
    assert recorder.count == 3, "a full row, a forecast, and what depends on their timestep"
    under_compile_lock(replayed, cfg_calls)
    assert recorder.count == 4, "the second stream's forecast; the full row reads no state"
    under_compile_lock(replayed, cfg_calls)
    assert recorder.count == 4


@pytest.mark.slow
def test_trajectories_side_by_side_keep_their_states_apart(recorder: Recorder) -> None:
    replayed, called = both()
    wanted = [under_compile_lock(called, lambda model, seed=seed: plain(model, seed)) for seed in (1, 2)]
    found = take_turns([plain(replayed, seed, enter=streams(replayed)) for seed in (1, 2)])
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_a_replaced_weight_is_seen(recorder: Recorder) -> None:
    models = both()
    for model in models:
        under_compile_lock(model, plain)
        with torch.no_grad():
            model._orig_mod.out.weight = nn.Parameter(2 * model._orig_mod.out.weight, requires_grad=False)
    assert same(*(under_compile_lock(model, plain) for model in models))


def test_buffers_are_handed_on_empty() -> None:
    """Zero times what isn't finite would not be zero: a slot that was never written is read like that."""
    buffers, layout = Buffers(), (StateSlot("state_000", 0, 0, Slot.Y0, (2, 3), "float32", "cpu", 24),)
    first, other = buffers.state(layout, 1), buffers.state(layout, 1)
    first.commit(0, (C,), [0], [torch.full((2, 3), float("nan"))])
    lay = first.tensors[0].data_ptr()
    assert lay != other.tensors[0].data_ptr()
    del first
    again = buffers.state(layout, 1)
    assert again.tensors[0].data_ptr() == lay
    assert not again.tensors[0].any()
    assert again.history == [()]


@pytest.mark.slow
def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: replay.Run, args: Sequence[Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(replay.RECORDERS, "cpu", refuse)
    replayed, called = both()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = under_compile_lock(replayed, plain)
    texts = [str(one.message) for one in caught if issubclass(one.category, MoecaWarning)]
    assert len(texts) == 3, "once for each variant, and for what depends on the timestep"
    assert (
        "v0 can't be recorded as a CUDA graph (operation not permitted when stream is capturing): it runs" in texts[1]
    )
    assert same(found, under_compile_lock(called, plain))


def test_a_recording_is_kept_for_a_few_sets_of_weights_alone() -> None:
    made = Recorder()
    run = replay.Replayed(lambda args: [args[0] * args[1]], "v0", {0}, made.record)
    weights = [torch.tensor(float(i)) for i in range(replay.MOST + 1)]
    for weight in weights:
        (found,) = run([torch.tensor(3.0), weight])
        assert found == 3 * weight
    assert len(run.recordings) == replay.MOST
    run([torch.tensor(4.0), weights[-1]])
    assert made.count == replay.MOST + 1
    run([torch.tensor(4.0), weights[0]])
    assert made.count == replay.MOST + 2, "the oldest was dropped"


def test_results_are_the_caller_s() -> None:
    run = replay.Replayed(lambda args: [args[0] + 1, None], "v0", {0}, _with_none)
    first, _ = run([torch.tensor(1.0)])
    second, nothing = run([torch.tensor(5.0)])
    assert (float(first), float(second), nothing) == (2.0, 6.0, None)


def test_results_that_are_lent_are_where_the_recording_has_them() -> None:
    run = replay.Replayed(lambda args: [args[0] + 1, 2 * args[0]], "v0", {0}, Recorder().record, own=1)
    first, lent = run([torch.tensor(1.0)])
    assert (float(first), float(lent)) == (2.0, 2.0)
    second, again = run([torch.tensor(5.0)])
    assert again is lent
    assert (float(first), float(second), float(lent)) == (2.0, 6.0, 10.0)


@pytest.mark.slow
def test_threads_take_what_they_were_lent_before_another_replays(recorder: Recorder) -> None:
    replayed, called = both()
    wanted = [under_compile_lock(called, lambda model, seed=seed: plain(model, seed)) for seed in (1, 2, 3)]
    commit, met = StreamState.commit, threading.Barrier(3)

    def slow(*args: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            met.wait(0.3)  # until the others have replayed the same variant too, if they may
        commit(*args)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        under_compile_lock(replayed, plain)
        patch.setattr(StreamState, "commit", slow)
        found = list(pool.map(lambda seed: _in_a_stream(replayed, seed), (1, 2, 3)))
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def _in_a_stream(model: nn.Module, seed: int) -> list[torch.Tensor]:
    with torch.no_grad(), moeca.trajectory(model, stream="mine"):
        return run(plain(model, seed))


def _with_none(run: replay.Run, args: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
    results = run(args)
    return lambda: results[0].copy_(run(args)[0]) and None, results


def test_without_a_gpu_it_is_refused() -> None:
    replayed, _ = both()
    with pytest.raises(OptionError, match="cuda_graphs=True, but this call's tensors are on cpu"):
        under_compile_lock(replayed, plain)
    with pytest.raises(OptionError, match="cuda_graphs='yes': expected True or False"):
        moeca.compile(dit(), cuda_graphs="yes")


def test_tensors_of_several_dtypes_are_copied_a_launch_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: lists.append(len(to)) or copy(to, of))
    of = [torch.arange(3.0), torch.arange(2), torch.ones(2), torch.ones(1, dtype=torch.bfloat16), torch.arange(4)]
    to = [torch.zeros_like(one) for one in of]
    to[2] = to[2].double()
    copy_all(to, of)
    assert all(torch.equal(one.to(other.dtype), other) for one, other in zip(to, of, strict=True))
    assert lists == [1, 2, 1, 1]
    copy_all([], [])
