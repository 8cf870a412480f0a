"""The callable for one of Dynamo's graphs: it finds the handle that calls, the program for the call, and runs it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch

from moeca_compile.engine.arrangement import Arrangement, overlaps, reads_strides, reordered, restrided
from moeca_compile.engine.frozen import OBSERVED, GraphRun, follows_from_call
from moeca_compile.engine.handle_runtime import HandleRuntime, WeightBinding
from moeca_compile.engine.intercept import INTERCEPTORS, interceptor_of
from moeca_compile.engine.program import Program
from moeca_compile.engine.step import run_step
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import CaptureError, StateError
from moeca_compile.frontend.calls import CALLS, Owner, call_of, find_owner, gate_of
from moeca_compile.frontend.first_call import out_of_date, renew_without_hooks
from moeca_compile.frontend.handles import STATES, HandleState, Read, all_states, state_of
from moeca_compile.frontend.owner import runs_whole
from moeca_compile.frontend.signature import captured_of, floats_of, kind_of, strides_of, with_floats
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.graph.capture import Capture, Input, inputs_of, under_compile_lock
from moeca_compile.graph.desugar import desugar
from moeca_compile.graph.same_graph import identity
from moeca_compile.lowering.inductor.as_given import lower_as_given

ENTRIES: weakref.WeakSet[Entry] = weakref.WeakSet()  # all of Dynamo's graphs that live
_numbers = itertools.count()


def entry_of(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], read: Callable[[Any], Read]
) -> Callable[..., tuple[Any, ...]]:
    """The callable that Dynamo gets for its graph. `read`: options and schedule of a handle, by its compile context."""
    plain, flatten = desugar(gm, example_inputs)
    entry = Entry(plain, inputs_of(plain, flatten(example_inputs)), read)
    return entry if plain is gm else lambda *args: entry(*flatten(args))


class Entry:
    """The callable for one Dynamo graph, whichever handles run it. What belongs to a handle isn't kept here."""

    def __init__(self, gm: torch.fx.GraphModule, inputs: tuple[Input, ...], read: Callable[[Any], Read]) -> None:
        self.gm, self.inputs, self._read = gm, inputs, read
        self.number = next(_numbers)
        self._weights = [i for i, one in enumerate(inputs) if one.is_weight]
        self._labels = [inputs[i].label for i in self._weights]
        self._others = [i for i, one in enumerate(inputs) if not one.is_weight]
        self._floats = floats_of(gm)
        self._unread = {i for i, one in enumerate(fx.placeholders(gm)) if not one.users}  # strides and sizes, mostly
        self._follows = {i for i, one in enumerate(fx.placeholders(gm)) if follows_from_call(one)}
        self._kinds: dict[Hashable, int] = {}  # of the kinds of weights met: hashing one takes long
        self._none: dict[Hashable, bool] = {}  # by the shapes of empty inputs, whether the results are empty too
        self._own: HandleState | None = None  # of callers that came without torch.compile
        self._as_given: Callable[..., Any] | None = None
        ENTRIES.add(self)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        call = CALLS.last
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise StateError(
                "moeca is for inference: grad mode is on and some tensors require grad. Call the model under "
                "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
            )
        for i in self._others:
            if isinstance(args[i], torch.Tensor) and not args[i].numel():
                results = self._run_if_empty(args)
                if results is not None:
                    if call is not None:
                        call.passes()
                    return results
                break
        owner = find_owner()
        context = None if owner is None else owner.handle
        state = STATES.get(id(context))
        if state is None or state.context is None or state.context() is not context:
            state = self._state(context)
        whole = state.whole.get(self.number)
        if not whole:
            whole, results = self._sort_out(owner, state, whole, args)
            if results is not None:
                return results
        if call is not None and call.waits:
            call.passes()
        runtime = state.runtime
        weights = runtime.invalidate_if_weights_changed(
            self.number, self._labels, [*map(args.__getitem__, self._weights)]
        )
        if INTERCEPTORS.get():
            interceptor = interceptor_of(context)
            if interceptor is not None:
                return interceptor(self, args, runtime)
        try:
            program, how = self._find(args, runtime, weights)
        except CaptureError as error:
            return self.run_uncached(args, str(error), state)
        trajectory = current(weights.ids, owner.frame if owner is not None else None)
        results = self.step(program, how, runtime, args, trajectory)
        if OBSERVED.runs is not None:
            others = [i for i in self._others if i not in self._follows or self._number(i, args) is None]
            OBSERVED.runs.append(GraphRun(partial(self.step, program, how, runtime), args, others, results))
        return results

    def _run_if_empty(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """The results for inputs without a sample: there is nothing to capture or to cache. None: they aren't empty."""
        shapes = tuple([a.shape for i in self._others if isinstance(a := args[i], torch.Tensor) and not a.numel()])
        if not self._none.get(shapes, True):
            return None
        results = tuple(self.gm(*args))
        self._none[shapes] = not any(isinstance(one, torch.Tensor) and one.numel() for one in results)
        return results if self._none[shapes] else None

    def _sort_out(
        self, owner: Owner | None, state: HandleState, whole: bool | None, args: Sequence[Any]
    ) -> tuple[bool, tuple[Any, ...] | None]:
        """Whether this graph is the handle's whole model (`whole`: False, or None at its first run), and, where it
        isn't, its results."""
        context = None if owner is None else owner.handle
        call = None if context is None else call_of(context)
        last = CALLS.last
        if whole is None:
            with gate_of(context).lock if context is not None else nullcontext(), under_compile_lock():
                whole = runs_whole(owner, self.gm, call.parts if call is not None else 0)
                if out_of_date(owner, state, whole, call):
                    if last is not None:
                        last.passes()
                    return whole, tuple(self.gm(*args))
                state.whole[self.number] = whole
        else:
            renew_without_hooks(owner, state.first)
        if whole:
            return True, None
        if last is not None:
            last.passes()
        if call is not None:
            call.ran_part(self.gm, partial(state.is_broken, dispatches=state.first.left))
        return False, self._run_as_given(args, state)

    def run_uncached(self, args: Sequence[Any], reason: str, state: HandleState | None = None) -> tuple[Any, ...]:
        """Run the whole model's graph as Dynamo gave it, because of `reason`, and say so once a handle."""
        if state is None:
            owner = find_owner()
            state = self._state(None if owner is None else owner.handle)
        state.is_refused(reason)
        return self._run_as_given(args, state)

    def _run_as_given(self, args: Sequence[Any], state: HandleState) -> tuple[Any, ...]:
        if self._as_given is None:
            self._as_given = lower_as_given(self.gm, state.options)
        return tuple(self._as_given(*args))

    def step(
        self,
        program: Program,
        how: Arrangement | None,
        runtime: HandleRuntime,
        args: Sequence[Any],
        trajectory: Trajectory | None,
    ) -> tuple[Any, ...]:
        """Run a call of `program`, for which `args` are to be arranged; as Dynamo gave it where a claim about the
        arguments turns out to be wrong (`passes/transform/separate_rows.py`)."""
        given = args
        if how is not None:
            args = how.arranged(args)
        running = runtime.running(trajectory)
        if trajectory is not None:
            trajectory.calls += 1
        try:
            if not program.packs_experts:
                results = run_step(program.compiled_schedule, running, args, trajectory)
            else:
                packs = runtime.packs
                with packs.active():
                    results = run_step(program.compiled_schedule, running, args, trajectory, packs.mark_unverified)
        except CaptureError as error:
            return self.run_uncached(given, str(error))
        return results if how is None else how.results(results)

    def place(self, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Program, Sequence[Any]]:
        """The program for arguments like these, and they as it takes them.

        Raises:
            CaptureError: the graph can't be captured, or has nothing to cache.
        """
        weights = runtime.invalidate_if_weights_changed(self.number, self._labels, [args[i] for i in self._weights])
        program, how = self._find(args, runtime, weights)
        return program, args if how is None else how.arranged(args)

    @property
    def runtimes(self) -> dict[int, HandleRuntime]:
        """Of all handles that this graph has run for."""
        return {id(runtime): runtime for state in all_states() if (runtime := state.runtime).has_run(self.number)}

    @property
    def programs(self) -> dict[Hashable, Program]:
        """Those that it runs now, for whichever handle."""
        return {
            (id(runtime), key): one
            for runtime in self.runtimes.values()
            for key, one in runtime.serving(self.number).items()
        }

    def _state(self, context: Any) -> HandleState:
        if context is not None:
            return state_of(context, self._read)
        if self._own is None:
            self._own = HandleState(None, *self._read(None))
        return self._own

    def _find(
        self, args: Sequence[Any], runtime: HandleRuntime, weights: WeightBinding
    ) -> tuple[Program, Arrangement | None]:
        """The program for arguments like these, captured if none of this handle's computes the same."""
        numbers: dict[int, Any] = {}
        read, tensors = [], []
        for i in self._others:  # at every step: written out, for calls would take longer than what they do
            a = args[i]
            if isinstance(a, torch.Tensor) and i not in self._floats:
                tensors.append((a.shape, strides_of(a) if 1 in a.shape else a.stride(), a.dtype, a.device))
                continue
            numbers[i] = self._number(i, args)
            if i not in self._unread:
                read.append(numbers[i])
        if weights.kind is None:
            weights.kind = self._kinds.setdefault(weights.kinds, len(self._kinds))
        casts = ambient_autocast() if torch._C._is_any_autocast_enabled() else ()
        key = (self.number, tuple(read), tuple(tensors), weights.kind, casts)
        found = runtime.find(key)
        if found is not None:
            return found
        with under_compile_lock():
            if key in runtime.refused:
                raise CaptureError(runtime.refused[key])
            try:
                return runtime.find(key) or self._make(key, args, numbers, runtime)
            except CaptureError as error:
                runtime.refused[key] = str(error)
                raise

    def _make(
        self, key: tuple[Any, ...], args: Sequence[Any], numbers: Mapping[int, Any], runtime: HandleRuntime
    ) -> tuple[Program, Arrangement | None]:
        """A new program, or one that was made for another of Dynamo's graphs: of the same text, of the same captured
        text, in which sizes are numbers, or of the same text but for the strides of its inputs. The last makes what it
        kept serve a latent that comes in another memory format."""
        by_label = sorted((one.label, repr(numbers.get(i)), kind_of(args[i])) for i, one in enumerate(self.inputs))
        as_given: Hashable = (self._identity, tuple(by_label), key[-1])
        if runtime.find(as_given) is not None:
            return self._beside(key, as_given, runtime)
        self._warn_of_numbers(key, numbers, runtime)
        gm = with_floats(self.gm, {i: numbers[i] for i in self._floats})
        captured = captured_of(gm, args, self.inputs)
        known = as_given if self._identity is self else identity(captured.gm, captured.inputs)
        if runtime.find(known) is not None:
            return self._beside(key, known, runtime)
        unstrided = self._unstrided(args, numbers, key[-1])
        if runtime.find(unstrided) is not None:
            return self._beside(key, unstrided, runtime, captured)
        read = runtime.options, runtime.schedule, runtime.warned
        program = Program(gm, args, self.inputs, *read, captured)
        runtime.place((key, as_given, unstrided, known), program)
        program.place_weights(args)
        weights = [args[i] for i in self._weights]
        runtime.invalidate_if_weights_changed(self.number, self._labels, weights)  # some may have been moved
        return program, None

    def _beside(
        self, key: Hashable, known: Hashable, runtime: HandleRuntime, captured: Capture | None = None
    ) -> tuple[Program, Arrangement | None]:
        """The program under `known` for the calls of `key` too. `captured`: where these come in other strides."""
        found = runtime.find(known)
        assert found is not None
        program = found[0]
        context = program.analysis.facts
        if captured is None:
            how = reordered(context.inputs, self.inputs)
        else:
            how = restrided(Capture(program.analysis.gm, context.inputs), captured)
        runtime.place_beside(key, known, how)
        return program, how

    def _unstrided(self, args: Sequence[Any], numbers: Mapping[int, Any], autocast: Hashable) -> Hashable:
        """Equal for graphs that are the same but for the strides of their inputs, weights left out."""
        if self._identity is self or reads_strides(self.gm) or any(map(overlaps, args)):
            return object()
        used = [(i, one) for i, one in enumerate(self.inputs) if i not in self._unread]
        kinds = [(one.label, repr(numbers.get(i)), kind_of(args[i], one.is_weight)) for i, one in used]
        return "any strides", identity(self.gm, self.inputs, strides=False), tuple(sorted(kinds)), autocast

    @cached_property
    def _identity(self) -> Hashable:
        """Equal for graphs that are the same; a graph whose inputs can't be told apart by name is like no other."""
        labels = {one.label for one in self.inputs}
        return identity(self.gm, self.inputs) if len(labels) == len(self.inputs) else self

    def _number(self, i: int, args: Sequence[Any]) -> Any:
        """Argument `i`, if it is a Python number: programs are made for its value. None: it is a tensor."""
        if i in self._floats:
            return args[i].item()
        return None if isinstance(args[i], torch.Tensor) else args[i]

    def _warn_of_numbers(self, key: tuple[Any, ...], numbers: Mapping[int, Any], runtime: HandleRuntime) -> None:
        known = [other[1] for other in runtime.keys_of(self.number) if other[2:] == key[2:]]
        if len(known) == 2:  # two may be a setting that was changed; a third is a habit
            labels = [self.inputs[i].label for i in numbers if i not in self._unread]
            moving = [label for n, label in enumerate(labels) if len({v[n] for v in (*known, key[1])}) == 3]
            runtime.warned.once(
                f"{', '.join(moving) or 'an input'} comes as a Python number that changes from call to call, and a "
                "graph is captured and compiled for each value. Pass it as a tensor",
                "numbers",
            )
