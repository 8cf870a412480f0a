"""The programs of the trials. Each prints one line, or raises."""

from __future__ import annotations

TORCH = """
import torch

version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
if version < (2, 11):
    raise RuntimeError(f"torch {torch.__version__} is older than 2.11")
assert torch.ones(3).sum().item() == 3
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
for i in range(len(gpus)):
    assert torch.ones(3, device=f"cuda:{i}").sum().item() == 3
where = ", ".join(gpus) or "no GPU"
print(f"{torch.__version__}, kernels for {torch.backends.cpu.get_cpu_capability()}, {where}")
"""

BACKEND = """
from importlib.metadata import entry_points

import moeca_compile

if not entry_points(group="torch_dynamo_backends", name="moeca"):
    raise RuntimeError("torch.compile doesn't know the backend 'moeca': the package is imported from a folder")
print(f"moeca-compile {moeca_compile.__version__}: torch.compile knows the backend 'moeca'")
"""

# Python's headers and OpenMP are what the code that Inductor writes includes
COMPILER = r"""
import ctypes, os, shutil, subprocess, sysconfig, tempfile

names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
compiler = next((path for name in names if (path := shutil.which(name))), None)
if compiler is None:
    raise ModuleNotFoundError(f"none of {', '.join(names)} is on the PATH")
with tempfile.TemporaryDirectory() as folder:
    source, library = os.path.join(folder, "a.cpp"), os.path.join(folder, "a.so")
    with open(source, "w") as file:
        file.write('#include <Python.h>\n#include <omp.h>\n#include <vector>\n'
                   'extern "C" int moeca() { return std::vector<int>(2).size() + (omp_get_max_threads() < 1); }\n')
    command = [compiler, "-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-fopenmp", source, "-o", library]
    command += ["-I", sysconfig.get_path("include")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise SystemExit(lines[0].replace(folder + os.sep, ""))
    assert ctypes.CDLL(library).moeca() == 2
version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
print(f"{version}, with OpenMP and Python's headers")
"""

INDUCTOR = """
import time
import torch

def function(x):
    return (x * 2 + 1).relu().sum(1)

x = torch.randn(16, 64)
begin = time.perf_counter()
compiled = torch.compile(function)
torch.testing.assert_close(compiled(x), function(x))
print(f"a small function was compiled in {time.perf_counter() - begin:.1f} s, and is right")
"""

# ONNX, opset 20: y = x + x for a float32 x of two elements
DOUBLE = (
    "08093a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a"
    "08080112040a020802620f0a0179120a0a08080112040a02080242040a001014"
)
_GRAPH = f"""
import numpy as np

MODEL = bytes.fromhex("{DOUBLE}")
"""

ONNXRUNTIME = f"""
{_GRAPH}
import onnxruntime

session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
assert session.run(None, dict(x=np.array([1, 2], np.float32)))[0].tolist() == [2, 4]
names = ", ".join(name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider")
print(onnxruntime.__version__ + ", a graph ran on CPUExecutionProvider; providers:", names)
"""

OPENVINO = f"""
{_GRAPH}
import openvino

core = openvino.Core()
model = core.compile_model(core.read_model(MODEL), "CPU")
assert model(dict(x=np.array([1, 2], np.float32)))[0].tolist() == [2, 4]
print(openvino.__version__ + ", a graph ran on CPU; devices:", *core.available_devices)
"""

TENSORRT = """
import importlib

for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
    try:
        library = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        continue
    print(f"{name} {library.__version__} loads; whether it builds for a GPU wasn't tried")
    break
else:
    raise ModuleNotFoundError("neither tensorrt nor tensorrt_rtx is installed")
"""

DIFFUSERS = """
import diffusers
from diffusers import DiffusionPipeline

print(diffusers.__version__)
"""
