"""Variant -> a callable over flat tensors, through Inductor or, for `inner="eager"`, as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.variant import Variant

Executable = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def lower_eager(variant: Variant) -> Executable:
    """Run the graph node by node: bitwise what the captured graph gives."""
    interpreter = torch.fx.Interpreter(variant.gm)
    return lambda args: interpreter.run(*args)


def lower_inductor(
    variant: Variant, args: Sequence[Any], mode: str | None = None, inner_options: Mapping[str, Any] | None = None
) -> Executable:
    """Compile for tensors like `args`. Weights stay inputs, so all variants share one copy; Inductor's on-disk cache
    serves a second process.

    Raises:
        LoweringError: Inductor refused the graph, the mode, or an option.
    """
    from torch._inductor import config, list_mode_options, standalone_compile

    try:
        options = {**(list_mode_options(mode) if mode else {}), **(inner_options or {})}
        unknown = [name for name in options if name not in config.get_config_copy()]
        if unknown:
            raise LoweringError(
                f"inner_options {unknown} are no options of Inductor (see torch._inductor.list_options())"
            )
        with torch.inference_mode(False), torch.no_grad():
            compiled = standalone_compile(
                variant.gm, list(args), dynamic_shapes="from_example_inputs", options=dict(options)
            )
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(
            f"Inductor refused variant {variant.name} ({variant.node_count} nodes): {error}. "
            "options={'inner': 'eager'} runs it uncompiled, which tells whose fault it is"
        ) from error
    return lambda args: compiled(*args)
