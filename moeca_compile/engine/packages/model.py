"""`moeca_compile.load`: a package as a module that stands for the model it was saved from."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_compile.dtypes import name_of
from moeca_compile.engine.handle_runtime import HandleRuntime
from moeca_compile.engine.packages.program import LoadedProgram
from moeca_compile.engine.step import refuse_gradients, run_step
from moeca_compile.engine.trajectories.blocks import current
from moeca_compile.engine.trajectories.statistics import stats_of
from moeca_compile.engine.trajectories.trajectory import Trajectory
from moeca_compile.errors import BundleError, StateError
from moeca_compile.graph.autocast import ambient_autocast
from moeca_compile.ops import branch_slots, experts  # noqa: F401  registers the operators that native code calls
from moeca_compile.options import Options
from moeca_compile.runtime.packages.machine import refuse_other_machine, this_machine
from moeca_compile.runtime.packages.manifest import WEIGHTS, ParameterSpec, SizeSpec, TensorLeaf, ValueLeaf
from moeca_compile.runtime.packages.package import Package
from moeca_compile.runtime.stats import Stats
from moeca_compile.runtime.warned import Warned

KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)  # of a model's parameters, by the numbers in a manifest


def load(path: str | Path) -> LoadedModel:
    """Load a package that `save` wrote. Neither Dynamo nor a C++ compiler is used.

    A package is native code, which runs with all rights of this process: load packages only from people you trust.
    Checksums tell a damaged package, and not a malicious one.

    Args:
        path: the directory.

    Returns:
        A module that is called as the model is, and caches as the compiled model does.

    Raises:
        BundleError: a file is missing or changed, or the package was compiled for another version of torch or another
            processor. No native code is loaded before these checks.
    """
    package = Package.open(path)
    refuse_other_machine(package.manifest.made_for, this_machine(torch.__version__))
    return LoadedModel(package)


class LoadedModel(torch.nn.Module):
    """A loaded package, as a module on the CPU in `eval()` mode. Its weights can't be changed.

    Args:
        package: verified, for this machine.

    Attributes:
        package: what was loaded.
        config: the model's configuration, where it has one that JSON can hold: entries are attributes too.
        programs: one for each size.
        runtime: its trajectories.
        parts, uncached: of the statistics.
    """

    parts, uncached = 1, ""

    def __init__(self, package: Package) -> None:
        super().__init__()
        manifest = package.manifest
        self.package, self.config = package, _Config(manifest.model.config or {})
        for module in manifest.model.modules:  # they register their types with torch's pytree
            importlib.import_module(module)
        try:
            weights = torch.load(package.path / WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever torch makes of a file that isn't its own
            raise BundleError(f"{WEIGHTS} can't be read: {error}") from error
        for i, weight in enumerate(weights.values()):
            self.register_buffer(f"weight_{i:05d}", weight, persistent=False)
        self._ids = frozenset(map(id, weights.values()))
        warned, options = Warned(), Options(schedule=package.schedule, latent_jump=manifest.latent_jump)
        self.runtime = HandleRuntime(None, options, package.schedule, warned, threading.RLock())
        self._signature = _signature(manifest.model.parameters)
        self.programs = [
            LoadedProgram(package.path, size, package.schedule, weights, warned) for size in manifest.sizes
        ]
        self._sizes = list(map(_Size, self.programs))
        self.eval()

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Run one step, for arguments as the saved model takes them.

        Raises:
            BundleError: arguments that the package wasn't saved for.
            StateError: gradients are asked for, or a trajectory is used by two threads.
            TypeError: arguments that the model's signature doesn't take.
        """
        bound = self._signature.bind(*args, **keywords)
        bound.apply_defaults()
        leaves, structure = pytree.tree_flatten(dict(bound.arguments))
        if torch.is_grad_enabled():
            refuse_gradients(leaves)
        size = next((size for size in self._sizes if size.takes(leaves, structure)), None)
        if size is None:
            raise BundleError(_other_call(dict(bound.arguments), [size.program.size for size in self._sizes]))
        size.check_autocast()
        trajectory = current(self._ids)
        running = self.runtime.running(trajectory)
        if trajectory is not None:
            trajectory.calls += 1
        packs = self.runtime.packs.active() if self.package.manifest.pack_experts else nullcontext()
        with torch.no_grad(), packs:
            outputs = run_step(size.program.compiled_schedule, running, size.program.arguments(leaves), trajectory)
        return size.result(outputs, leaves)

    def trajectory(
        self, steps: int | None = None, stream: str | None = None, *, timesteps: Sequence[float] = ()
    ) -> Trajectory:
        """Say where a trajectory begins and ends, as `moeca_compile.trajectory` does.

        Args:
            steps: how many calls of one stream are expected; one more is refused. None: any number.
            stream: a name, for samplers that call the model several times a step.
            timesteps: of the calls, as the model receives them, one a step.

        Returns:
            A context manager.

        Raises:
            StateError: `steps` below one. On leaving the block: other timesteps came than were declared.
        """
        return Trajectory(self._ids, steps, stream, timesteps)

    def stats(self) -> Stats:
        """What ran since the last `reset`, and what is held now, as `moeca_compile.stats` reports it."""
        return stats_of([self])

    def reset(self) -> None:
        """Drop all cached state: the next call starts cold."""
        self.runtime.reset()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the weights have."""
        dtype: torch.dtype = getattr(torch, self.package.manifest.model.dtype)
        return dtype

    def train(self, mode: bool = True) -> LoadedModel:
        """Refuse training mode.

        Raises:
            StateError: `mode` is True.
        """
        if mode:
            raise StateError("train: a loaded package is for inference; train the model that it was saved from")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoadedModel:
        """What `to`, `half`, `cuda` and the like call: native code stays as it was compiled."""
        before = torch.empty(0, dtype=self.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise StateError(
                f"a loaded package can't be moved or converted to {name_of(after.dtype)} on {after.device}: it was "
                f"compiled in {name_of(before.dtype)} for the CPU. Convert the model, and save it again"
            )
        return self


class _Config(dict[str, Any]):
    """A configuration whose entries are attributes too, as those of diffusers are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's configuration has no entry {name!r}") from None


class _Size:
    """One kind of call: which calls are of this kind, and what they return."""

    def __init__(self, program: LoadedProgram) -> None:
        self.program, size = program, program.size
        self._call, self._result = pytree.treespec_loads(size.call), pytree.treespec_loads(size.result)
        self._leaves = [_expected(leaf) for leaf in size.leaves]
        self._autocast = tuple((device, getattr(torch, dtype)) for device, dtype in size.autocast)
        self._results = [
            (entry.output, entry.leaf, None if entry.value is None else _value(entry.value)) for entry in size.results
        ]

    def takes(self, leaves: Sequence[Any], structure: pytree.TreeSpec) -> bool:
        """Whether a call is of this kind."""
        return len(leaves) == len(self._leaves) and structure == self._call and list(map(_seen, leaves)) == self._leaves

    def check_autocast(self) -> None:
        """Raises:
        StateError: another autocast is on than was when the package was saved.
        """
        now = ambient_autocast()
        if now != self._autocast:
            names = [
                ", ".join(f"{device} {name_of(dtype)}" for device, dtype in casts) for casts in (now, self._autocast)
            ]
            raise StateError(
                f"autocast is {names[0] or 'off'}, and was {names[1] or 'off'} when the package was saved: save it "
                "again under this autocast"
            )

    def result(self, outputs: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """The result of a call, out of the graph's outputs."""
        values = []
        for output, leaf, value in self._results:
            values.append(outputs[output] if output is not None else value if leaf is None else leaves[leaf])
        return pytree.tree_unflatten(values, self._result)


def _seen(leaf: Any) -> tuple[Any, ...]:
    """What a call is told by: shape, dtype and device of a tensor, or a value and its type."""
    return (leaf.shape, leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _expected(leaf: TensorLeaf | ValueLeaf) -> tuple[Any, ...]:
    if isinstance(leaf, TensorLeaf):
        return torch.Size(leaf.shape), getattr(torch, leaf.dtype), "cpu"
    value = _value(leaf)
    return type(value), value


def _value(leaf: ValueLeaf) -> Any:
    if leaf.of == "dtype":
        return getattr(torch, str(leaf.value))
    return torch.device(str(leaf.value)) if leaf.of == "device" else leaf.value


def _signature(parameters: Sequence[ParameterSpec]) -> inspect.Signature:
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(one.name, KINDS[one.kind], default=empty if one.default is None else _value(one.default))
            for one in parameters
        ]
    )


def _other_call(arguments: Mapping[str, Any], sizes: Sequence[SizeSpec]) -> str:
    received = ", ".join(describe_leaves(arguments))
    saved = "; or for ".join(map(str, sizes))
    return (
        f"the package wasn't saved for a call with {received}. It was saved for {saved}. Save it for this call too: "
        "moeca_compile.save(model, folder, *inputs, other_sizes=[...])"
    )


def describe_leaves(arguments: Mapping[str, Any]) -> list[str]:
    """The leaves of a call as a package's manifest describes them, in words."""
    described = []
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        name = leaf_name(path)
        if isinstance(leaf, Tensor):
            place = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
            described.append(f"{TensorLeaf(name, name_of(leaf.dtype), tuple(leaf.shape))}{place}")
        else:
            described.append(f"{name}={leaf!r}")
    return described


def leaf_name(path: Sequence[Any]) -> str:
    """The name of a leaf of a call: `added.text[0]` for a path of pytree keys."""
    first, *rest = path
    return f"{first.key}{pytree.keystr(tuple(rest))}"
