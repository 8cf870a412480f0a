"""The callable for one of Dynamo's graphs: it finds the calling handle and the program, and runs a step."""

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
from moeca_compile.engine.step import refuse_gradients, run_step
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import CaptureError, OptionError
from moeca_compile.frontend.calls import CALLS, Call, Owner, call_of, find_owner, gate_of
from moeca_compile.frontend.denoisers import reason_to_leave
from moeca_compile.frontend.first_call import is_outdated, retrace_without_hooks
from moeca_compile.frontend.handles import STATES, HandleState, Read, all_states, state_of
from moeca_compile.frontend.owner import is_full_model
from moeca_compile.frontend.signature import (
    captured_of,
    floats_of,
    labelled_kinds,
    strides_of,
    warn_of_numbers,
    warn_of_shapes,
    with_caches_as_arguments,
    with_floats,
)
from moeca_compile.frontend.summary import announce
from moeca_compile.frontend.symbols.other_size import other_size
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.graph.capture import Capture, Input, inputs_of, under_compile_lock
from moeca_compile.graph.desugar import desugar
from moeca_compile.graph.same_graph import identity
from moeca_compile.inspect.trace import current_compile, log_capture
from moeca_compile.lowering.inductor.as_given import lower_as_given
from moeca_compile.passes.dump import text_of
from moeca_compile.schedule.granularity import OUTPUT

ENTRIES: weakref.WeakSet[Entry] = weakref.WeakSet()  # of all graphs of Dynamo that are alive
_numbers = itertools.count()


def entry_of(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], read: Callable[[Any], Read]
) -> Callable[..., tuple[Any, ...]]:
    """The callable that Dynamo gets for its graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: of the graph.
        read: returns options and schedule of a handle, by its compile context.
    """
    plain, flatten = desugar(gm, example_inputs)
    entry = Entry(plain, inputs_of(plain, flatten(example_inputs)), read)
    return entry if plain is gm else lambda *args: entry(*flatten(args))


class Entry:
    """The callable for one of Dynamo's graphs. Several handles may run it; their state isn't stored here.

    Attributes:
        gm: the graph.
        inputs: of the graph.
        number: identifies the graph.
    """

    def __init__(self, gm: torch.fx.GraphModule, inputs: tuple[Input, ...], read: Callable[[Any], Read]) -> None:
        self.gm, self.inputs, self._read = gm, inputs, read
        self.number = next(_numbers)
        self._compile_id = current_compile()
        placeholders = fx.placeholders(gm)
        self._classify(inputs)
        self._floats = floats_of(gm)
        self._unread = {i for i, node in enumerate(placeholders) if not node.users}  # strides and sizes, mostly
        self._follows = {i for i, node in enumerate(placeholders) if follows_from_call(node)}
        self._kinds: dict[Hashable, int] = {}  # numbers for the kinds of weights: a kind takes long to hash
        self._gives_empty: dict[Hashable, bool] = {}  # by the shapes of empty inputs, whether the results are empty
        self._without_handle: HandleState | None = None  # of calls without torch.compile
        self._uncached: Callable[..., Any] | None = None
        ENTRIES.add(self)

    def _classify(self, inputs: tuple[Input, ...]) -> None:
        self.inputs = inputs
        self.__dict__.pop("_identity", None)
        self._weights = [i for i, source in enumerate(inputs) if source.is_weight]
        self._labels = [inputs[i].label for i in self._weights]
        self._others = [i for i, source in enumerate(inputs) if not source.is_weight]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        call = CALLS.last
        if torch.is_grad_enabled():
            refuse_gradients(args)
        for i in self._others:
            if isinstance(args[i], torch.Tensor) and not args[i].numel():
                results = self._run_if_empty(args)
                if results is not None:
                    if call is not None:
                        call.release_gate()
                    return results
                break
        owner = find_owner()
        context = None if owner is None else owner.handle
        state = STATES.get(id(context))
        if state is None or state.context is None or state.context() is not context:
            state = self._state(context)
        if state.options.granularity == OUTPUT:
            return self._run_computed(args, state, call, context)
        is_full = state.is_full_model.get(self.number)
        if not is_full:
            results = self._run_part(owner, state, is_full, args)
            if results is not None:
                return results
        if call is not None and call.holds_gate:
            call.release_gate()
        runtime = state.runtime
        weights = runtime.invalidate_if_weights_changed(
            self.number, self._labels, [*map(args.__getitem__, self._weights)]
        )
        if INTERCEPTORS.get():
            interceptor = interceptor_of(context)
            if interceptor is not None:
                return interceptor(self, runtime.freed.values(args), runtime)
        try:
            program, arrangement = self._find(args, runtime, weights)
        except CaptureError as error:
            return self.run_uncached(args, str(error), state)
        if not program.is_announced:
            announce(program, state, () if owner is None else owner.modules)
        trajectory = current(weights.ids, owner.frame if owner is not None else None)
        results = self.step(program, arrangement, runtime, args, trajectory)
        if OBSERVED.runs is not None:
            others = [i for i in self._others if i not in self._follows or self._number(i, args) is None]
            OBSERVED.runs.append(GraphRun(partial(self.step, program, arrangement, runtime), args, others, results))
        return results

    def _run_computed(
        self, args: Sequence[Any], state: HandleState, call: Call | None, context: Any
    ) -> tuple[Any, ...]:
        """A graph of a computed step, for a handle that caches what the whole model returns."""
        if call is not None and call.holds_gate:
            call.release_gate()
        if context is None or not gate_of(context).covered:
            raise OptionError(
                "granularity='output' decides before the model is called whether it runs; torch.compile's backend "
                "isn't asked that early. Use moeca_compile.compile(model, granularity='output', ...)"
            )
        return self._run_as_given(args, state)

    def _run_if_empty(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """Run the graph for inputs without a sample, if its results are empty too: there is nothing to cache. None: the
        results aren't empty."""
        tensors = [args[i] for i in self._others if isinstance(args[i], torch.Tensor)]
        shapes = tuple([tensor.shape for tensor in tensors if not tensor.numel()])
        if not self._gives_empty.get(shapes, True):
            return None
        results = tuple(self.gm(*args))
        self._gives_empty[shapes] = not any(isinstance(result, torch.Tensor) and result.numel() for result in results)
        return results if self._gives_empty[shapes] else None

    def _run_part(
        self, owner: Owner | None, state: HandleState, is_full: bool | None, args: Sequence[Any]
    ) -> tuple[Any, ...] | None:
        """Run the graph uncached if it is a part of a broken model, or of the model before it was prepared.

        Args:
            owner: the handle that is calling.
            state: of that handle.
            is_full: False: the graph is a part; None: its first run, where that is found out.
            args: of the graph.

        Returns:
            The results; None: the graph is the full model, and nothing was run.
        """
        context = None if owner is None else owner.handle
        call = None if context is None else call_of(context)
        last = CALLS.last
        if is_full is None:
            with gate_of(context).lock if context is not None else nullcontext(), under_compile_lock():
                is_full = is_full_model(owner, self.gm, call.parts if call is not None else 0)
                if owner is not None and (reason := reason_to_leave(owner.function, is_full, args)):
                    if last is not None:
                        last.release_gate()
                    return self.run_uncached(args, reason, state)
                if is_outdated(owner, state, is_full, call):
                    if last is not None:
                        last.release_gate()
                    return tuple(self.gm(*args))
                state.is_full_model[self.number] = is_full
        else:
            retrace_without_hooks(owner, state.first)
        if is_full:
            return None
        if last is not None:
            last.release_gate()
        if call is not None:
            call.ran_part(self.gm, partial(state.report_breaks, dispatches=state.first.rejected))
        return self._run_as_given(args, state)

    def run_uncached(self, args: Sequence[Any], reason: str, state: HandleState | None = None) -> tuple[Any, ...]:
        """Run the full model's graph as Dynamo made it, and warn once for each handle.

        Args:
            args: of the graph.
            reason: why the graph isn't cached.
            state: of the calling handle; default: it is found.
        """
        if state is None:
            owner = find_owner()
            state = self._state(None if owner is None else owner.handle)
        state.report_uncached(reason)
        return self._run_as_given(args, state)

    def _run_as_given(self, args: Sequence[Any], state: HandleState) -> tuple[Any, ...]:
        if self._uncached is None:
            self._uncached = lower_as_given(self.gm, state.options)
        return tuple(self._uncached(*state.runtime.freed.values(args)))

    def step(
        self,
        program: Program,
        arrangement: Arrangement | None,
        runtime: HandleRuntime,
        args: Sequence[Any],
        trajectory: Trajectory | None,
    ) -> tuple[Any, ...]:
        """Run one step.

        The graph runs uncached if an assumption about the arguments is wrong (`passes/transform/separate_rows.py`).

        Args:
            program: for the call.
            arrangement: of the program's arguments among `args`; None: they are the same.
            runtime: of the calling handle.
            args: of the graph.
            trajectory: that the call belongs to; None: the call is in none.
        """
        graph_args = args
        if arrangement is not None:
            args = arrangement.arranged(args)
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
            return self.run_uncached(graph_args, str(error))
        return results if arrangement is None else arrangement.results(results)

    def place(self, args: Sequence[Any], runtime: HandleRuntime) -> tuple[Program, Sequence[Any]]:
        """The program for arguments like these, and the arguments as the program takes them.

        Raises:
            CaptureError: the graph can't be captured, or has nothing to cache.
        """
        program, arrangement = self._find(args, runtime, self._bind(args, runtime))
        return program, args if arrangement is None else arrangement.arranged(args)

    def _bind(self, args: Sequence[Any], runtime: HandleRuntime) -> WeightBinding:
        weights = [args[i] for i in self._weights]
        return runtime.invalidate_if_weights_changed(self.number, self._labels, weights)

    @property
    def runtimes(self) -> dict[int, HandleRuntime]:
        """The runtimes of all handles that have run this graph, by id."""
        return {id(runtime): runtime for state in all_states() if (runtime := state.runtime).has_run(self.number)}

    @property
    def programs(self) -> dict[Hashable, Program]:
        """The programs that serve this graph now, of all handles."""
        served = ((number, runtime.serving(self.number)) for number, runtime in self.runtimes.items())
        return {(number, key): program for number, programs in served for key, program in programs.items()}

    def _state(self, context: Any) -> HandleState:
        if context is not None:
            return state_of(context, self._read)
        if self._without_handle is None:
            self._without_handle = HandleState(None, *self._read(None))
        return self._without_handle

    def _find(
        self, args: Sequence[Any], runtime: HandleRuntime, weights: WeightBinding
    ) -> tuple[Program, Arrangement | None]:
        """The program for arguments like these, and its arrangement. The graph is captured if no program of the handle
        computes the same."""
        numbers: dict[int, Any] = {}
        read, tensors = [], []
        for i in self._others:  # runs at every step: written out, because function calls would take longer
            arg = args[i]
            if isinstance(arg, torch.Tensor) and i not in self._floats:
                strides = strides_of(arg) if 1 in arg.shape else arg.stride()
                tensors.append((arg.shape, strides, arg.dtype, arg.device))
                continue
            numbers[i] = self._number(i, args)
            if i not in self._unread:
                read.append(numbers[i])
        if weights.kind is None:
            weights.kind = self._kinds.setdefault(weights.kinds, len(self._kinds))
        casts = ambient_autocast() if torch._C._is_any_autocast_enabled() else ()
        key = (self.number, tuple(read), tuple(tensors), weights.kind, casts)
        placed = runtime.find(key)
        if placed is not None:
            return placed
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
        """A new program, or a program that was made for another of Dynamo's graphs and computes the same.

        Graphs compute the same if they are equal, if they are equal once captured (then sizes are numbers), or if only
        the strides of their inputs differ. In the last case the state serves a latent in another memory format too.
        """
        graph_key: Hashable = (self._identity, labelled_kinds(self.inputs, args, numbers), key[-1])
        if runtime.find(graph_key) is not None:
            return self._beside(key, graph_key, runtime)
        read = [self.inputs[i].label for i in numbers if i not in self._unread]
        warn_of_numbers(key, runtime.keys_of(self.number), read, runtime.warned)
        gm = with_floats(self.gm, {i: numbers[i] for i in self._floats})
        captured = captured_of(gm, args, self.inputs)
        inputs = with_caches_as_arguments(self.inputs, captured)
        if inputs != self.inputs:
            self._classify(inputs)
            return self._find(args, runtime, self._bind(args, runtime))
        is_known = self._identity is not self
        captured_key = (identity(captured.gm, captured.inputs), captured.autocast) if is_known else graph_key
        if runtime.find(captured_key) is not None:
            return self._beside(key, captured_key, runtime, began=captured.began)
        any_strides_key = self._any_strides_key(args, numbers, key[-1])
        if not captured.caches and runtime.find(any_strides_key) is not None:  # a copy isn't the caller's cache
            return self._beside(key, any_strides_key, runtime, captured, captured.began)
        warn_of_shapes(captured, runtime.programs.values(), runtime.warned)
        like = [node.meta.get("val", arg) for node, arg in zip(fx.placeholders(captured.gm), args, strict=True)]
        program = Program(
            gm, args, self.inputs, runtime.options, runtime.schedule, runtime.warned, captured, key=graph_key,
            freed=runtime.freed, sizes=runtime.sizes, other=partial(other_size, self.gm, like),
        )  # fmt: skip
        program.compiler.compile_id = self._compile_id
        text = partial(text_of, program.analysis.gm)
        log_capture(program.regions, program.roles, program.schedule, text, self._compile_id)
        runtime.place((key, graph_key, any_strides_key, captured_key), program)
        program.place_weights(args)
        self._bind(args, runtime)  # some may have been moved
        return program, None

    def _beside(
        self, key: Hashable, placed_key: Hashable, runtime: HandleRuntime, captured: Capture | None = None,
        began: float | None = None,
    ) -> tuple[Program, Arrangement | None]:  # fmt: skip
        """Let that program serve calls of `key` too. `captured`: this graph, of other strides. `began`: its capture."""
        placed = runtime.find(placed_key)
        assert placed is not None
        program = placed[0]
        if began is not None:
            program.compiler.note("capture", began)
        gm, inputs = program.analysis.gm, program.analysis.facts.inputs
        arrangement = reordered(inputs, self.inputs) if captured is None else restrided(Capture(gm, inputs), captured)
        runtime.place_beside(key, placed_key, arrangement)
        return program, arrangement

    def _any_strides_key(self, args: Sequence[Any], numbers: Mapping[int, Any], autocast: Hashable) -> Hashable:
        """A key that is equal for graphs that differ only in the strides of their inputs; strides of weights count."""
        if self._identity is self or reads_strides(self.gm) or any(map(overlaps, args)):
            return object()
        kinds = labelled_kinds(self.inputs, args, numbers, self._unread, strides=False)
        return "any strides", identity(self.gm, self.inputs, strides=False), kinds, autocast

    @cached_property
    def _identity(self) -> Hashable:
        """A key that is equal for equal graphs. A graph with two inputs of one label equals no other."""
        labels = {source.label for source in self.inputs}
        return identity(self.gm, self.inputs) if len(labels) == len(self.inputs) else self

    def _number(self, i: int, args: Sequence[Any]) -> Any:
        """The value of argument `i` if it is a Python number, for which a program is made. None: it is a tensor."""
        if i in self._floats:
            return args[i].item()
        return None if isinstance(args[i], torch.Tensor) else args[i]
