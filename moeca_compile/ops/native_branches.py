"""The C++ of `moeca::branches_`: compiled once by Inductor's own compiler and flags, and kept in its cache.

Which functions there are, and what they take, is for the C++ files to say; here are their names and kinds of argument.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moeca_compile.errors import warn

_CODE = [Path(__file__).with_name(name) for name in ("branches.cpp", "products.cpp", "top_k.cpp")]
# Inductor forbids both, for its own kernels are written with vectors: loops as vector instructions, and a product and
# the sum after it as one.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "b": ctypes.c_bool, "t": ctypes.c_int}
_ARGUMENTS = {  # p: an address, i: a size, f: a number, b: a flag, t: the number of threads
    "choose": "pppppppppp" + "fi" + "iiiii" + "ppt",
    "gather_float32": "ppp" + "iiiiii" + "pppt",
    "gather_bfloat16": "ppp" + "iiiiii" + "pppt",
    "few_rows": "ppp" + "iiiii" + "pt",
    "step": "ppppppppppppppppp" + "pfibbi" + "iiiiiiii" + "pt",
    "top_k": "piii" + "pppt",
    **dict.fromkeys(
        ("merge_float32", "merge_bfloat16", "merge_float32_narrow", "merge_bfloat16_narrow"),
        "ppppppppppppppppfibb" + "iiiiii" + "pt",
    ),
}


@functools.cache
def library() -> Any:
    """The compiled functions by name; compiled at the first call, in seconds, and found in Inductor's cache later.

    Returns:
        A `ctypes.CDLL`; None where no C++ compiler works: a warning says so, once.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        loaded = CppCodeCache.load("\n".join(path.read_text() for path in _CODE), extra_flags=_FLAGS)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warn(
            f"the kernel of expert branches can't be compiled ({reason}): rows that compute some branches run operator "
            "by operator, which gives the same and is slower. `moeca doctor` looks at the C++ compiler"
        )
        return None
    for name, kinds in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = [_KINDS[kind] for kind in kinds]
        function.restype = ctypes.c_int64 if name.startswith(("gather", "step", "top_k")) else None
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def addresses(groups: Sequence[Sequence[Tensor]]) -> Any:
    """One array of the addresses of all groups' tensors; a group of none has as many null pointers as the first has
    tensors."""
    none = (None,) * len(groups[0])
    every = [*itertools.chain.from_iterable(map(Tensor.data_ptr, group) if group else none for group in groups)]
    return (ctypes.c_void_p * len(every))(*every)
