"""What Inductor wants of the C++ compiler before its first kernel, done while the model is still being captured.

Which vector instructions there are takes a compilation and a new process, 3 to 5 seconds of waiting; on a machine that
never compiled with this torch, the header that all kernels include takes 8 more. A small kernel compiled in the
background wants both. Inductor keeps what came of it, so that whoever asks second has it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import copy_context

import torch

# `at::vec` is how Inductor knows that a kernel is to be compiled for vector instructions, as nearly all are
KERNEL = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out0) { at::vec::Vectorized<float>(1.0f).store(out0, 1); }
"""


def compiles_on_cpu(tensors: Iterable[object]) -> bool:
    """Whether Inductor writes its kernels for a graph with these inputs in C++."""
    devices = {one.device.type for one in tensors if isinstance(one, torch.Tensor)}
    return devices == {"cpu"}


@functools.cache
def ask_compiler() -> threading.Thread:
    """Ask in the background, once a process."""
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401  here: imports want one thread

    load = codecache.CppPythonBindingsCodeCache.load_pybinding
    ask = functools.partial(copy_context().run, _quietly, lambda: load(["float*"], KERNEL))  # with Inductor's options
    asking = threading.Thread(target=ask, name="moeca asks g++", daemon=True)
    asking.start()
    return asking


def _quietly(ask: Callable[[], object]) -> None:
    with suppress(Exception):  # Inductor asks again, and says what is wrong
        ask()
