"""The clock against a ground truth: trajectories are known by name here, and the clock sees only what a call shows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeca_compile.graph.variant import SLOTS, StateSlot
from moeca_compile.runtime.clock import MAX_STREAMS, CallObservation, Clock, Counter, StepPlacement
from moeca_compile.runtime.driver import StepDriver
from moeca_compile.runtime.state import StreamState
from moeca_compile.runtime.warned import Warned
from moeca_compile.schedule import Action, Schedule

LAYOUT = (StateSlot("state_000", 0, 0, SLOTS[0], (1,), "float32", "cpu", 4),)
NEAR, FAR = 0.1, 1.4  # relative change of a latent within a trajectory; between two of them (independent noise: sqrt 2)


@dataclass(frozen=True)
class Call:
    """What really happens: which trajectory and stream calls, at which of its timesteps."""

    trajectory: int
    stream: Hashable
    step: int
    timestep: float


@dataclass(frozen=True)
class Trajectory:
    """A sampling loop: where it starts and stops, its streams, and from which step on it drops all but the first."""

    number: int
    timesteps: tuple[float, ...]
    streams: tuple[Hashable, ...] = ("",)
    single_from: int = 10**6
    visits: int = 1  # 2: a Heun-type solver, which calls at each timestep but the first twice

    def calls(self) -> Iterator[Call]:
        for step, timestep in enumerate(self.timesteps):
            streams = self.streams if step < self.single_from else self.streams[:1]
            for _ in range(self.visits if step else 1):
                for stream in streams:
                    yield Call(self.number, stream, step, timestep)


@dataclass
class Simulation:
    """The dispatcher in small. Every state it writes is labelled with the call that wrote it."""

    clock: Clock
    schedule: Schedule

    def __post_init__(self) -> None:
        self.driver = StepDriver(self.schedule, Warned())

    def run(self, calls: Sequence[Call]) -> list[tuple[Call, StepPlacement, bool]]:
        """Each call, its tick, and whether it was computed; a stale or foreign state is an assertion error."""
        states: dict[Hashable, StreamState] = {}
        last: Call | None = None
        done = []
        for call in calls:
            jump = 0.0 if last is None else NEAR if last.trajectory == call.trajectory else FAR
            placement = self.clock.observe(CallObservation(call.timestep, call.stream, jump))
            last = call
            if placement.restart:
                states.clear()
            done.append((call, placement, self._step(call, placement, states)))
        return done

    def _step(self, call: Call, placement: StepPlacement, states: dict[Hashable, StreamState]) -> bool:
        if placement.stream is None:
            return True
        state = states.setdefault(placement.stream, StreamState(LAYOUT, 1))
        row, _ = self.driver.choose(state, placement.step, None)
        computed = row[0] is Action.COMPUTE
        if not computed:
            writer: Call = state.tensors[0]
            assert (writer.trajectory, writer.stream) == (call.trajectory, call.stream), f"{call} reads {writer}"
            assert placement.step - state.history[0][0] == call.step - writer.step, (
                f"{call} misjudges the age of {writer}"
            )
        self.driver.keep(state, placement.step, row, [0] if computed else [], [call] if computed else [])
        return computed


# -- strategies -------------------------------------------------------------------------------------------------------

GRID = tuple(1000.0 - 50 * i for i in range(20))


@st.composite
def trajectories(draw: st.DrawFn, number: int) -> Trajectory:
    first = draw(st.integers(0, 12))
    count = draw(st.integers(1, 7))
    grid = GRID if draw(st.booleans()) else tuple(reversed(GRID))
    streams = draw(st.sampled_from([("",), ("cat",), ("cat", "null"), ("dog", "null"), ("null", "cat", "dog")]))
    single_from = draw(st.sampled_from([10**6, 2, 3]))
    return Trajectory(number, grid[first : first + count], streams, single_from, draw(st.sampled_from([1, 1, 1, 2])))


@st.composite
def interleavings(draw: st.DrawFn) -> list[Call]:
    """Up to three loops, their calls mixed in any way that keeps each loop's own order."""
    loops = [list(draw(trajectories(number)).calls()) for number in range(draw(st.integers(1, 3)))]
    turns = draw(st.permutations([i for i, loop in enumerate(loops) for _ in loop]))
    waiting = [iter(loop) for loop in loops]
    return [next(waiting[i]) for i in turns]


@st.composite
def queues(draw: st.DrawFn) -> list[Call]:
    """One loop after the other, each stopped anywhere."""
    loops = [draw(trajectories(number)) for number in range(draw(st.integers(1, 4)))]
    return [call for loop in loops for call in list(loop.calls())[: draw(st.integers(1, 12))]]


SCHEDULES = st.sampled_from([Schedule.uniform(3, order=0), Schedule.uniform(5, order=0), Schedule.uniform(2, 2, 0)])


# -- what must hold ---------------------------------------------------------------------------------------------------


@given(interleavings(), SCHEDULES)
def test_a_state_is_never_used_across_trajectories_or_streams(calls: list[Call], schedule: Schedule) -> None:
    Simulation(Clock(), schedule).run(calls)


@given(queues(), SCHEDULES)
def test_a_state_is_never_used_after_an_early_stop(calls: list[Call], schedule: Schedule) -> None:
    Simulation(Clock(), schedule).run(calls)


@given(trajectories(0), SCHEDULES)
def test_a_lone_trajectory_is_followed_step_by_step(loop: Trajectory, schedule: Schedule) -> None:
    """Nothing is lost to caution: undisturbed, every call but a second visit lands on its own step and stream."""
    done = Simulation(Clock(), schedule).run(list(loop.calls()))
    seen = set()
    for call, placement, _ in done:
        assert placement.step == call.step
        if (call.step, call.stream) not in seen:
            assert placement.stream is not None
            assert not placement.warning
        seen.add((call.step, call.stream))
    assert [placement.restart for _, placement, _ in done] == [True] + [False] * (len(done) - 1)


@given(st.integers(2, 4), st.integers(2, 8), st.booleans())
def test_whole_trajectories_in_a_row_each_start_at_step_zero(loops: int, steps: int, rising: bool) -> None:
    grid = tuple(reversed(GRID))[:steps] if rising else GRID[:steps]
    calls = [call for number in range(loops) for call in Trajectory(number, grid, ("cat", "null")).calls()]
    done = Simulation(Clock(), Schedule.uniform(3)).run(calls)
    assert [placement.step for _, placement, _ in done] == [call.step for call, _, _ in done]
    assert not any(placement.warning for _, placement, _ in done)


def test_interleaved_trajectories_run_cold_and_say_so() -> None:
    loops = [list(Trajectory(n, GRID[:6], ("cat", "null")).calls()) for n in range(2)]
    calls = [call for pair in zip(*loops, strict=True) for call in pair]
    done = Simulation(Clock(), Schedule.uniform(3)).run(calls)
    assert all(computed for _, _, computed in done)
    assert any("stream=" in placement.warning for _, placement, _ in done)


def test_steps_of_a_warm_up_call_are_forgotten_without_a_warning() -> None:
    clock = Clock()
    clock.observe(CallObservation(1.0))
    ticks = [clock.observe(CallObservation(t, jump=jump)) for t, jump in ((1000.0, FAR), (950.0, NEAR), (900.0, NEAR))]
    assert ticks == [StepPlacement(0, 0, restart=True, broken_off=True), StepPlacement(1, 0), StepPlacement(2, 0)]


def test_a_trajectory_that_starts_where_the_last_one_stopped_is_cold() -> None:
    """img2img at the very timestep at which another run was stopped: only the latent tells."""
    clock = Clock()
    for t, jump in ((1000.0, 0.0), (950.0, NEAR), (900.0, NEAR)):
        clock.observe(CallObservation(t, "cat", jump))
    placement = clock.observe(CallObservation(900.0, "cat", FAR))
    assert placement.restart
    assert clock.observe(CallObservation(850.0, "cat", NEAR)) == StepPlacement(1, 0)


def test_another_trajectory_at_the_same_timestep_does_not_become_a_missing_stream() -> None:
    clock = Clock()
    for stream in ("cat", "null"):
        clock.observe(CallObservation(1000.0, stream, NEAR))
    clock.observe(CallObservation(950.0, "cat", NEAR))
    placement = clock.observe(CallObservation(950.0, "null", FAR))
    assert placement.restart or placement.stream is None
    assert "stream=" in placement.warning


def test_a_second_visit_is_computed_in_full_and_the_next_step_goes_on() -> None:
    clock = Clock()
    ticks = [clock.observe(CallObservation(t, jump=NEAR)) for t in (3.0, 2.0, 2.0, 1.0)]
    assert [(placement.step, placement.stream) for placement in ticks] == [(0, 0), (1, 0), (1, None), (2, 0)]
    assert "visited again" in ticks[2].warning


def test_a_new_condition_after_the_first_step_is_computed_in_full() -> None:
    clock = Clock()
    clock.observe(CallObservation(3.0, "cat"))
    placement = clock.observe(CallObservation(2.0, "dog", NEAR))
    assert placement.stream is None
    assert "conditioning" in placement.warning
    assert "stream=" in placement.warning


def test_at_most_four_streams_share_a_timestep() -> None:
    clock = Clock()
    ticks = [clock.observe(CallObservation(3.0, number)) for number in range(MAX_STREAMS + 1)]
    assert [placement.stream for placement in ticks] == [0, 1, 2, 3, None]
    assert "stream=" in ticks[-1].warning


def test_the_first_call_again_is_another_image() -> None:
    clock = Clock()
    assert (
        clock.observe(CallObservation(3.0, "cat"))
        == clock.observe(CallObservation(3.0, "cat"))
        == StepPlacement(0, 0, restart=True)
    )


@pytest.mark.parametrize("timesteps", [(3.0, 2.0, 3.0), (1.0, 2.0, 1.0)])
def test_a_flip_of_direction_starts_cold(timesteps: tuple[float, ...]) -> None:
    clock = Clock()
    ticks = [clock.observe(CallObservation(t, jump=NEAR)) for t in timesteps]
    assert [placement.restart for placement in ticks] == [True, False, True]


def test_an_unreadable_timestep_is_computed_in_full_with_its_reason() -> None:
    clock = Clock()
    clock.observe(CallObservation(3.0))
    placement = clock.observe(CallObservation(None, trouble="why"))
    assert (placement.stream, placement.warning) == (None, "why")


def test_a_step_is_made_by_any_of_several_timesteps() -> None:
    """The middle one stands still, another one moves."""
    clock = Clock()
    calls = [CallObservation(0.0, stream, position=p) for p in (9.0, 8.0, 7.0) for stream in ("cat", "null")]
    placements = [clock.observe(call) for call in calls]
    assert [(placed.step, placed.stream) for placed in placements] == [(s, n) for s in range(3) for n in range(2)]
    assert clock.observe(CallObservation(0.0, "cat", position=9.0)).restart


def test_positions_of_two_kinds_of_calls_are_not_compared() -> None:
    """One stream has a clean first frame, so its timesteps have another mean."""
    clock = Clock()
    calls = [
        CallObservation(t, kind, kind=kind, position=t * share)
        for t in (9.0, 8.0)
        for kind, share in ((1, 0.5), (2, 1.0))
    ]
    placements = [clock.observe(call) for call in calls]
    assert [(placed.step, placed.stream) for placed in placements] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_timesteps_that_move_both_ways_are_computed_in_full_with_their_reason() -> None:
    clock = Clock()
    calls = [(9.0, ""), (8.0, "both ways"), (7.0, "")]
    placements = [clock.observe(CallObservation(t, jump=NEAR, trouble=trouble)) for t, trouble in calls]
    assert [(placed.step, placed.stream) for placed in placements] == [(0, 0), (0, None), (1, 0)]
    assert placements[1].warning == "both ways"


BFLOAT16 = 2.0**-7


def rounded(times: Sequence[float], streams: Sequence[str] = ("",), jump: float = NEAR) -> list[StepPlacement]:
    """A loop whose timesteps are bfloat16; within a step the latent stays as it is."""
    clock = Clock()
    calls = [(t, stream, jump if number == 0 else 0.0) for t in times for number, stream in enumerate(streams)]
    return [clock.observe(CallObservation(t, stream, change, eps=BFLOAT16)) for t, stream, change in calls]


@pytest.mark.parametrize("times", [(1000, 1000, 996, 992, 992, 988), (1000, 996, 996), (0.5, 0.5, 0.498, 0.498)])
def test_steps_whose_timesteps_round_to_one_are_two(times: tuple[float, ...]) -> None:
    assert [placed.step for placed in rounded(times)] == list(range(len(times)))
    placements = rounded(times, ("cat", "null"))
    assert [(placed.step, placed.stream) for placed in placements] == [
        (s, n) for s in range(len(times)) for n in (0, 1)
    ]


def test_a_second_visit_is_none_of_them_where_timesteps_are_far_apart() -> None:
    assert [placed.stream for placed in rounded((1000, 950, 950, 900))] == [0, 0, None, 0]


def test_the_first_call_again_with_the_same_latent_is_another_image_in_any_dtype() -> None:
    assert all(placed.restart for placed in rounded((1000, 1000), jump=0.0))


def test_a_latent_that_is_not_finite_starts_cold() -> None:
    clock = Clock()
    for t in (3.0, 2.0):
        clock.observe(CallObservation(t, jump=NEAR))
    assert clock.observe(CallObservation(1.0, jump=math.nan)).restart


def test_calls_of_another_kind_go_on_with_the_trajectory() -> None:
    """A guidance interval: batch 1, then batch 2 for a while, then batch 1 again; each kind has streams of its own."""
    clock = Clock()
    calls = [(9.0, 1, "cat"), (8.0, 1, "cat"), (7.0, 2, "both"), (6.0, 2, "both"), (5.0, 1, "cat")]
    ticks = [clock.observe(CallObservation(t, condition, NEAR, kind=kind)) for t, kind, condition in calls]
    assert [(placement.step, placement.stream) for placement in ticks] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0)]
    assert not any(placement.warning for placement in ticks)


def test_the_streams_of_a_kind_are_fixed_in_the_step_of_its_first_call() -> None:
    clock = Clock()
    clock.observe(CallObservation(9.0, "cat"))
    ticks = [clock.observe(CallObservation(8.0, stream, NEAR, kind=2)) for stream in ("cat", "null")]
    assert [(placement.step, placement.stream) for placement in ticks] == [(1, 1), (1, 2)]
    assert clock.observe(CallObservation(7.0, "dog", NEAR, kind=2)).stream is None


@pytest.mark.parametrize("jump", [FAR, -1.0])
def test_a_call_of_another_kind_far_from_the_last_is_another_trajectory(jump: float) -> None:
    clock = Clock()
    for t in (9.0, 8.0):
        clock.observe(CallObservation(t, jump=NEAR))
    placement = clock.observe(CallObservation(7.0, jump=jump, kind=2))
    assert placement.restart
    assert bool(placement.warning) == (jump == FAR)  # another size isn't the next step of anything


def test_streams_of_two_kinds_may_have_latents_of_their_own() -> None:
    clock = Clock()
    calls = [(9.0, 1, 0.0), (9.0, 2, FAR), (8.0, 1, NEAR), (8.0, 2, NEAR)]
    ticks = [clock.observe(CallObservation(t, jump=jump, kind=kind)) for t, kind, jump in calls]
    assert [(placement.step, placement.stream) for placement in ticks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_trajectories_of_two_sizes_that_take_turns_are_told_to_say_so() -> None:
    clock = Clock()
    calls = [(9.0, 1, 0.0), (6.0, 2, -1.0), (8.0, 1, -1.0), (5.0, 2, -1.0)]
    ticks = [clock.observe(CallObservation(t, jump=jump, kind=kind)) for t, kind, jump in calls]
    assert all(placement.restart for placement in ticks)
    assert any("stream=" in placement.warning for placement in ticks)


def test_an_exact_trajectory_looks_at_no_latent() -> None:
    clock = Clock(latent_jump=math.inf)
    ticks = [clock.observe(CallObservation(t, jump=jump)) for t, jump in ((3.0, 0.0), (2.0, FAR), (1.0, math.nan))]
    assert [placement.step for placement in ticks] == [0, 1, 2]


def test_a_named_stream_counts_every_call() -> None:
    counter = Counter()
    ticks = [counter.observe(CallObservation(0.0)) for _ in range(3)]
    assert [placement.step for placement in ticks] == [0, 1, 2]
    assert [placement.restart for placement in ticks] == [True, False, False]
    assert len({placement.stream for placement in ticks}) == 1
