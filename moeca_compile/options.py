"""The options of `torch.compile(model, backend="moeca", options={...})` and of `moeca_compile.compile`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moeca_compile.errors import OptionError
from moeca_compile.schedule import MAX_ORDER, Schedule
from moeca_compile.schedule.granularity import OUTPUT, Granularity

FREE_MODES = ("host", "drop")
INNERS = ("inductor", "eager")
DEFAULT_SCHEDULE = "uniform:2:warmup=4"


@dataclass(frozen=True)
class Options:
    """The options of the backend. Every field is also a keyword of `moeca_compile.compile`.

    Attributes:
        schedule: a `Schedule`, the path of a schedule's JSON file, or a short form (`full`, `uniform:3`,
            `uniform:3:warmup=2`, `adaptive:0.05`, `speedup:2`: the shortest uniform interval with half the MACs,
            to within 5 %). The default is cautious: four full steps, then every second step
            computed, the others forecast.
        order: of the forecast, for short forms: 0 copies, 1 (None) extrapolates linearly, 2 quadratically. A `Schedule`
            and a file have their own; another one beside them is refused.
        granularity: what the schedule's columns are: `region` (each attention, experts and mlp by itself), or one span
            of blocks: `stack` (what leaves all of them), `blocks:2:-2` (the change that a slice of them makes),
            `skip:1` (what lies between the ends of the long skip that keeps one outer block on each side). What is
            outside the span is always computed. `output`: what the whole model returns; cheap steps don't call it.
        inner: what runs a variant: `inductor`, or `eager` (operator by operator: slow, bitwise equal to the graph).
        inner_options: handed to the inner compiler as they are (Inductor's config keys).
        mode: torch.compile's `mode`, handed to Inductor.
        max_signatures: how many input signatures (shapes, dtypes, autocast) keep their programs; the oldest go first.
        latent_jump: relative change ||x - x_last|| / ||x_last|| of the latent between two calls, the largest of the
            batch's samples, above which a call is taken for another trajectory and starts cold. Neighboring steps of
            one trajectory stay well below.
        pack_experts: on CPUs, keep a second copy of the routed experts' weights in the layout that oneDNN multiplies
            fastest. The copy is made at the first call, and again after a weight changed. Results are equal to those of
            the plain form to float tolerance. It pays most where an expert gets few rows (PARTIAL rows). On GPUs, in
            bfloat16, move the weights of a layer's experts side by side into one storage, in place, at the first call,
            so that they aren't gathered at every call. Results are bitwise the same, and no copy is kept. Tensors that
            shared a weight's memory no longer do. Weights that share a storage with others (FSDP's flat parameters)
            stay where they are.
        cuda_graphs: on GPUs, record each variant once as a CUDA graph and replay it, with state at fixed addresses. It
            is for small batches, whose kernels are shorter than their launches. It costs a copy of the state in full
            steps and, for each variant and stream, the memory of its intermediate values.
        hand_over: for models of one architecture that are compiled together, such as a pipeline's two transformers:
            the first step of the second one uses what the first one kept. Otherwise the second one starts cold. It
            saves a full step, and loses quality where the models' outputs differ for equal inputs.
        free_hoisted: weights that only prologues read (`explain` tells their bytes) leave the device once the values of
            a trajectory's timesteps are computed. "host" (or True): to the host's memory, from where they are copied
            for another conditioning or other timesteps. "drop": for good; then only calls with the timesteps and
            conditioning of that trajectory can be computed. Under it a schedule without state hoists too.
        share_sizes: from the second size of a call's tensors on (images, prompts, batches), Inductor compiles a variant
            once for all further sizes, where its graph allows that; with `dynamic=True` of `compile`, from the first
            on. False: for each size.
        disable: names of passes to leave out (see `moeca_compile.pipeline`).
        dump: folder for numbered graphs before and after each pass; default the environment's MOECA_DUMP.

    Raises:
        OptionError: a value of the wrong type or range, or options that exclude each other.
        ScheduleError: a schedule that can't be read.
    """

    schedule: Schedule | str | Path = DEFAULT_SCHEDULE
    order: int | None = None
    granularity: str = "region"
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    max_signatures: int = 8
    latent_jump: float = 0.7
    pack_experts: bool = False
    cuda_graphs: bool = False
    hand_over: bool = False
    free_hoisted: bool | str = False
    share_sizes: bool = True
    disable: tuple[str, ...] = ()
    dump: str | Path | None = None

    def __post_init__(self) -> None:
        _expect("order", self.order, (int, type(None)), lambda v: v is None or 0 <= v <= MAX_ORDER, "0, 1 or 2")
        _expect("schedule", self.schedule, (Schedule, str, Path), _any, "a Schedule, a path or a short form")
        _expect("granularity", self.granularity, str, _any, "a text")
        Granularity.parse(self.granularity)
        _expect("inner_options", self.inner_options, Mapping, _any, "a dict of the inner compiler's options")
        _expect("max_signatures", self.max_signatures, int, lambda v: v >= 1, "a whole number >= 1")
        _expect("latent_jump", self.latent_jump, (int, float), lambda v: v > 0, "a number > 0")
        for name in ("pack_experts", "cuda_graphs", "hand_over", "share_sizes"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"option {name}={getattr(self, name)!r}: expected True or False")
        _expect("disable", self.disable, (tuple, list), _any, "a tuple of pass names")
        _expect("mode", self.mode, (str, type(None)), _any, "torch.compile's mode or None")
        _expect("dump", self.dump, (str, Path, type(None)), _any, "a folder or None")
        if self.inner not in INNERS:
            raise OptionError(f"inner={self.inner!r}: expected one of {INNERS}{_did_you_mean(str(self.inner), INNERS)}")
        if self.inner == "eager" and (self.inner_options or self.mode):
            raise OptionError("inner='eager' takes no mode and no inner_options: nothing compiles there")
        object.__setattr__(self, "disable", tuple(self.disable))
        if not isinstance(self.free_hoisted, bool) and self.free_hoisted not in FREE_MODES:
            raise OptionError(f"option free_hoisted={self.free_hoisted!r}: expected False, True, 'host' or 'drop'")
        if self.free_hoisted and self.granularity == OUTPUT:
            raise OptionError("free_hoisted is for captured graphs, and granularity='output' has none: leave one out")
        if self.hand_over and self.cuda_graphs:
            raise OptionError(
                "hand_over moves state from one model to the other, and cuda_graphs keep it at fixed addresses: leave "
                "one of them out"
            )
        if self.granularity == OUTPUT and (self.cuda_graphs or self.pack_experts):
            raise OptionError(
                "granularity='output' calls the model as it is: leave cuda_graphs and pack_experts out, they are for "
                "the variants of a captured graph"
            )
        if isinstance(self.schedule, Schedule):
            self.resolved_schedule()

    @classmethod
    def from_backend_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Read torch.compile's `options=` and `mode=`.

        Args:
            options: field names and values; None: all defaults.
            mode: torch.compile's `mode`; "default" and None are the same.

        Returns:
            The options, checked.

        Raises:
            OptionError: an unknown name (with the nearest known one) or a value of the wrong type or range.
        """
        known = tuple(f.name for f in fields(cls))
        given = dict(options or {})
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{_did_you_mean(name, known)}; known: {', '.join(known)}")
        if mode not in (None, "default"):
            if given.get("mode") not in (None, mode):
                raise OptionError(f"mode={mode!r} and the option mode={given['mode']!r} differ: give one of them")
            given["mode"] = mode
        return cls(**given)

    @property
    def free_mode(self) -> str:
        """`host`, `drop`, or "": where weights go that only prologues read."""
        if isinstance(self.free_hoisted, str):
            return self.free_hoisted
        return FREE_MODES[0] if self.free_hoisted else ""

    def resolved_schedule(self) -> Schedule:
        """Give the schedule itself: short forms are parsed with `order`, files are read.

        Returns:
            The schedule, not yet bound to a graph.

        Raises:
            ScheduleError: the schedule can't be read.
            OptionError: `order` differs from that of a `Schedule` or a file.
        """
        if isinstance(self.schedule, Schedule):
            found, where = self.schedule, "the schedule"
        elif (text := str(self.schedule)).endswith(".json") or ".json@" in text:
            found, where = Schedule.parse(text), f"the schedule {text!r}"
        else:
            return Schedule.parse(text, order=1 if self.order is None else self.order)
        if self.order not in (None, found.order):
            raise OptionError(
                f"option order={self.order}: {where} has order {found.order} of its own. Leave order out; it is for "
                "short forms such as 'uniform:3'"
            )
        return found


def _any(value: Any) -> bool:
    return True


def _expect(name: str, value: Any, kind: type | tuple[type, ...], accepts: Callable[[Any], bool], wanted: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not accepts(value):
        raise OptionError(f"option {name}={value!r}: expected {wanted}")


def _did_you_mean(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
