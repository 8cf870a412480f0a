"""A script that repeats a refusal of Inductor's: the graph, tensors like those that it got, and the call.

It holds no weights: tensors are drawn at random, but for constants of a few elements.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

_SCRIPT = '''"""Inductor refused this graph of moeca-compile, variant {name}, with torch {torch}:

{error}

    python {file}            compile it, as it was tried
    python {file} --eager    run it operator by operator
"""

import sys

import torch
from torch import device, inf, nan
from torch._inductor import standalone_compile

import moeca_compile.backend  # brings the operators moeca::


def like(shape, stride, dtype, where):
    made = torch.empty_strided(shape, stride, dtype=dtype, device=where)
    return made.normal_() if dtype.is_floating_point else made.zero_()


{module}

torch.manual_seed(0)
ARGS = [
{args}
]
OPTIONS = {options!r}

if __name__ == "__main__":
    graph = torch.fx.symbolic_trace(Repro())
    with torch.no_grad():
        if "--eager" in sys.argv:
            results = graph(*ARGS)
        else:
            compiled = standalone_compile(
                graph, ARGS, dynamic_shapes="from_example_inputs", options={{"config_patches": OPTIONS}}
            )
            results = compiled(*ARGS)
    print("ran:", [tuple(result.shape) for result in results])
'''


def write_repro(
    name: str, gm: GraphModule, args: Sequence[Any], options: Mapping[str, Any], error: BaseException
) -> Path | None:
    """Write the script.

    Args:
        name: of the variant.
        gm: the graph that was refused.
        args: of the graph.
        options: Inductor's config entries.
        error: what Inductor raised.

    Returns:
        Its path, in a temporary folder of this process; None: the graph can't be written as a script, or the disk is
        full. What was refused matters more than the script.
    """
    with suppress(Exception):
        from torch._dynamo.debug_utils import NNModuleToString

        module = NNModuleToString.convert(gm)
        file = f"repro_{name}_{hashlib.sha256(module.encode()).hexdigest()[:8]}.py"
        text = _SCRIPT.format(
            name=name,
            torch=torch.__version__,
            error="\n".join(str(error).splitlines()[:20]).replace("\\", "/").replace('"""', "'''"),
            file=file,
            module=module.replace("from torch.nn import *", ""),
            args="\n".join(f"    {_written(arg)}," for arg in args),
            options=dict(options),
        )
        path = _folder() / file
        path.write_text(text)
        return path
    return None


def _written(arg: Any) -> str:
    if not isinstance(arg, torch.Tensor):
        return repr(arg)
    return f"like({tuple(arg.shape)}, {arg.stride()}, {arg.dtype}, {str(arg.device)!r})"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="moeca_repro_"))
