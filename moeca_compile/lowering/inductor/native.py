"""Variant -> a file of native code, through AOTInductor: it runs later, in another process, without a compiler.

Weights stay inputs, so that the files of all variants use one copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeca_compile.errors import LoweringError
from moeca_compile.graph.variant import Variant
from moeca_compile.lowering.inductor.lower import distinct, inductor_options
from moeca_compile.passes.manager import Pass, PassManager

SUFFIX = ".pt2"  # AOTInductor insists on it


def write_native(
    variant: Variant, args: Sequence[Any], file: Path, mode: str | None, inner_options: Mapping[str, Any],
    passes: Sequence[Pass[Variant]], manager: PassManager,
) -> None:  # fmt: skip
    """Compile for tensors like `args`, after these passes, and write the result to `file`.

    Args:
        variant: what to compile.
        args: its arguments, for their shapes, dtypes and strides.
        file: to make; its name ends in `SUFFIX`.
        mode: torch.compile's.
        inner_options: Inductor's config keys.
        passes: graph passes on the way to AOTInductor.
        manager: runs them.

    Raises:
        LoweringError: AOTInductor refused the graph, the mode, or an option.
    """
    from torch._inductor import aoti_compile_and_package

    gm = manager.rewrite(passes, variant.gm, variant, label=f"{variant.name} ")
    options = inductor_options(mode, inner_options)
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):  # torch's, about torch's own code
                warnings.simplefilter("ignore", category)
            exported = torch.export.export(gm, tuple(distinct(args)), strict=False)
            aoti_compile_and_package(exported, package_path=str(file), inductor_configs=options)
    except Exception as error:
        raise LoweringError(
            f"AOTInductor refused variant {variant.name} ({variant.node_count} nodes): {error}. "
            "moeca_compile.compile runs this model; a package can't hold it"
        ) from error
