"""Variant -> a callable over flat tensors, through Inductor or, for `inner="eager"`, as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.errors import LoweringError, warn
from moeca_compile.graph import fx
from moeca_compile.graph.autocast import without_autocast
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.repeat_blocks import has_bodies, repeat_blocks
from moeca_compile.lowering.inductor.repro import write_repro
from moeca_compile.lowering.inductor.sizes.shared import SharedSizes
from moeca_compile.lowering.inductor.split_table import arguments_of
from moeca_compile.lowering.inductor.straight_stream import straight_stream
from moeca_compile.lowering.inductor.weight_addresses import with_addresses
from moeca_compile.ops.direct import call_directly
from moeca_compile.passes.manager import Pass, PassManager

Executable = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
AtOtherSize = Callable[[], tuple[Variant, Sequence[Any]] | None]  # a variant at another size, with tensors for it

MANY_STATES = 16  # that a variant reads
IN_ONE_KERNEL = 8  # of Inductor's nodes on a GPU, each of about as many states


def lower_eager(variant: Variant) -> Executable:
    """Run the graph's own code, operator by operator: bitwise what the captured graph gives."""
    return without_autocast(fx.code_of(variant.gm), unpack=True)


def lower_inductor(
    variant: Variant, args: Sequence[Any], mode: str | None = None, inner_options: Mapping[str, Any] | None = None,
    passes: Sequence[Pass[Variant]] = (), manager: PassManager | None = None, sizes: SharedSizes | None = None,
    other: AtOtherSize = lambda: None,
) -> Executable:  # fmt: skip
    """Compile for tensors like `args`, after these passes. Weights stay inputs, so all variants share one copy;
    Inductor's on-disk cache serves a second process.

    Args:
        variant: what to compile.
        args: its arguments, for their shapes, dtypes, devices and strides.
        mode: torch.compile's.
        inner_options: Inductor's config keys.
        passes: graph passes on the way to Inductor.
        manager: runs them.
        sizes: programs that serve several sizes; None: it is compiled for this size alone.
        other: the variant at another size, for `sizes`; gives None: it isn't known.

    Raises:
        LoweringError: Inductor refused the graph, the mode, or an option.
    """
    manager = manager or PassManager()
    if repeat_blocks.__name__ in manager.disable:
        passes = _without_bodies(passes)

    def prepared(variant: Variant) -> tuple[torch.fx.GraphModule, Callable[[Sequence[Any]], Sequence[Any]]]:
        gm = manager.rewrite(passes, variant.gm, variant, label=f"{variant.name} ")
        for node in gm.graph.nodes:  # sizes that depend on data get names of their own where Inductor traces again
            node.meta.pop("unbacked_bindings", None)
        split, replaced = arguments_of(gm), with_addresses(gm)
        return gm, lambda args: replaced(split(args))

    def at_other_size() -> tuple[torch.fx.GraphModule, Sequence[Any]] | None:
        found = other()
        if found is None:
            return None
        gm, split = prepared(found[0])
        return gm, list(split(found[1]))

    gm, split = prepared(variant)
    if variant.changes:
        args = distinct(args)
    options: dict[str, Any] = {}
    try:
        options = _for_device(variant, args) | inductor_options(mode, inner_options)
        compile_ = partial(_compiled, options)
        given = list(split(args))
        if sizes is None:
            compiled = compile_(gm, given, None)
        else:
            compiled = sizes.lower(variant.name, gm, given, compile_, at_other_size)
    except LoweringError:
        raise
    except Exception as error:
        if has_bodies(gm):
            warn(
                f"Inductor refused variant {variant.name} with one body for equal blocks ({error}): each block is "
                "compiled for itself. options={'disable': ('repeat_blocks',)} does so from the start"
            )
            return lower_inductor(variant, args, mode, inner_options, _without_bodies(passes), manager, sizes, other)
        repro = write_repro(variant.name, gm, split(args), options, error)
        repeats = f"`python {repro}` repeats it; please attach that file to a report. " if repro else ""
        raise LoweringError(
            f"Inductor refused variant {variant.name} ({variant.node_count} nodes): {error}. {repeats}"
            "options={'inner': 'eager'} runs it uncompiled, which tells whose fault it is"
        ) from error
    return lambda given: compiled(*split(given))


def distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments as different tensors: torch.export, and AOTAutograd where an input is changed in place, take a
    tensor that comes twice for one input, in later calls too, and unwritten slots of the state share theirs."""
    found = set[int]()
    apart = []
    for arg in args:
        apart.append(arg.clone() if id(arg) in found else arg)
        found.add(id(arg))
    return apart


def _compiled(
    options: Mapping[str, Any], gm: torch.fx.GraphModule, args: Sequence[Any], mode: FakeTensorMode | None
) -> Callable[..., Sequence[Any]]:
    """Compile for tensors like `args`; `mode`: of fake tensors whose sizes are symbols."""
    from torch._inductor import standalone_compile

    call_directly()
    patches = {"config_patches": dict(options)}
    with torch.inference_mode(False), torch.no_grad():
        if mode is None:
            return standalone_compile(gm, list(args), dynamic_shapes="from_example_inputs", options=patches)
        with tracing(TracingContext(mode)):
            return standalone_compile(gm, list(args), dynamic_shapes="from_tracing_context", options=patches)


def inductor_options(mode: str | None, inner_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inductor's config keys for a mode of torch.compile's, and the caller's own.

    Raises:
        LoweringError: a key that Inductor doesn't have.
    """
    from torch._inductor import config, list_mode_options

    options = {**(list_mode_options(mode) if mode else {}), **(inner_options or {})}
    unknown = [name for name in options if name not in config.get_config_copy()]
    if unknown:
        raise LoweringError(f"inner_options {unknown} are no options of Inductor (see torch._inductor.list_options())")
    return options


def _without_bodies(passes: Sequence[Pass[Variant]]) -> Sequence[Pass[Variant]]:
    """Where blocks have no bodies, Inductor orders what goes between them by itself."""
    return [one for one in passes if one not in (straight_stream, repeat_blocks)]


def _for_device(variant: Variant, args: Sequence[Any]) -> dict[str, Any]:
    """Options of Inductor's that reading many states wants.

    By itself it fuses the sum of all states into the layer norm after it. On a GPU that kernel wants more registers
    than there are: 3.7 kB a thread are spilled (ptxas for sm_90a, 112 states of 1152 channels in bfloat16, the tile
    that Inductor takes), and a step that only reads took 20 to 50 times as long as its bytes do. In kernels of 8 nodes
    nothing is spilled: those of DiT-MoE-XL/2, batch 8, read 3.5 TB/s on an H200 (in kernels of 16 nodes 0.4).
    """
    on_gpu = any(isinstance(one, torch.Tensor) and one.device.type == "cuda" for one in args)
    return {"max_fusion_size": IN_ONE_KERNEL} if on_gpu and len(variant.reads) > MANY_STATES else {}
