"""The `torch.compile` entry point: it takes Dynamo's graph and returns a callable.

Nothing is compiled here. At the first real call the callable finds the model, prepares it, and sees shapes. Errors are
raised there too, because torch turns an error inside a backend into BackendCompilerFailed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from moeca_compile.engine.trajectories.group import TrajectoryGroup
from moeca_compile.errors import MoecaError, OptionError
from moeca_compile.frontend.calls import find_owner, gate_of
from moeca_compile.frontend.entry import entry_of
from moeca_compile.frontend.handles import Read, backend_of
from moeca_compile.options import Options


def moeca(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., tuple[Any, ...]]:
    """The backend: `torch.compile(model, backend="moeca", options={...})`. See `moeca_compile.Options`."""
    try:
        if unknown:
            raise OptionError(f"torch.compile handed over {sorted(unknown)}, which this backend doesn't know")
        parsed = Options.from_backend_options(options, mode)
    except MoecaError as error:
        refusal = error

        def refuse(*args: Any) -> tuple[Any, ...]:
            raise refusal

        return refuse
    owner = find_owner()
    if owner is not None:
        gate_of(owner.handle).count()
    return entry_of(gm, example_inputs, partial(read_options, parsed))


class Backend:
    """The backend of one `moeca_compile.compile`: its options, and the schedule as it was read then.

    Attributes:
        trajectories: those of models that were compiled together; None: one model.
    """

    def __init__(self, options: Options, together: bool = False) -> None:
        self.options, self.schedule = options, options.resolved_schedule()
        hands_over = options.hand_over or (self.schedule.hand_over and not options.cuda_graphs)
        self.trajectories = TrajectoryGroup(options.latent_jump, hands_over) if together else None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        return entry_of(gm, example_inputs, partial(read_options, self.options))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Backend) or self.trajectories is not other.trajectories:
            return False
        return (self.options, self.schedule) == (other.options, other.schedule)

    __hash__ = object.__hash__


def read_options(options: Options, context: Any) -> Read:
    """The options of the handle with this compile context (None: `options`), and its schedule as it is now."""
    compiled = None if context is None else backend_of(context)
    function = getattr(compiled, "compiler_fn", compiled)
    if isinstance(function, Backend):
        return function.options, function.schedule
    if function is moeca:
        keywords: Mapping[str, Any] = getattr(compiled, "kwargs", {})
        options = Options.from_backend_options(keywords.get("options"), keywords.get("mode"))
    return options, options.resolved_schedule()
