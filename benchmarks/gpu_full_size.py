"""Full-size transformers of diffusers on a GPU, beside peers that compute in full at as many steps.

    python -m benchmarks.gpu_full_size                 # all models; writes results/gpu_full_size.json, one at a time
    python -m benchmarks.gpu_full_size --models flux   # one of them
    python -m benchmarks.gpu_full_size --quick         # two narrow blocks, also without a GPU: does it run?

Weights are random, so speed and memory only: bfloat16, one sample a call, the sizes of examples/full_size.py. All
contenders of a model share its weights, and each compiles its repeated blocks or its whole graph, whichever its own
documentation recommends. Trajectories take turns; medians and ratios as `benchmarks.protocol` has them. A model at a
time in a process of its own, so that a broken run keeps what it has.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile as moeca
from benchmarks.protocol import Timing, arguments, as_json, folder_of, interleave, machine, print_table, save
from benchmarks.turns import in_turns
from examples import full_size

MODELS = ("flux", "hidream", "qwen_image", "wan")
BASELINE = "torch.compile"
LATENTS, TIMESTEPS = "hidden_states", ("timestep", "timesteps")
STEPS, INTERVAL, WARMUP = 14, 3, 3
NARROW = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}  # of flux
FEW = {"hidden_states": 64, "img_ids": 64, "encoder_hidden_states": 8, "txt_ids": 8}  # its tokens then


@dataclass(frozen=True)
class Work:
    """A model and how it is sampled.

    Attributes:
        name: of a function of examples/full_size.py.
        device: where it runs.
        sizes: other ones than the released; with few tokens.
        rounds: timed trajectories of each contender.
    """

    name: str
    device: str
    sizes: Mapping[str, Any] | None = None
    rounds: int = 3

    def network(self) -> tuple[nn.Module, dict[str, Any]]:
        """The prepared model with random weights, and a call's arguments by name."""
        torch.manual_seed(0)
        empty, inputs = getattr(full_size, self.name)(**self.sizes or {})
        with torch.device(self.device):  # tables that are no buffers have to be computed, too
            model = type(empty).from_config(empty.config)
        model = model.to(torch.bfloat16).eval().requires_grad_(False)
        for name, tensor in model.named_parameters():
            # small, so that no activation overflows; norms keep what they receive
            nn.init.ones_(tensor) if tensor.dim() < 2 and name.endswith("weight") else nn.init.normal_(tensor, std=0.02)
        moeca.prepare(model)
        filled = {name: _filled(value, self.device) for name, value in inputs.items()}
        for name, count in FEW.items() if self.sizes else ():
            filled[name] = filled[name].narrow(-2, 0, count)
        return model, filled


def _filled(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=value.dtype, device=device)
    return torch.ones(value.shape, dtype=value.dtype, device=device)


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        model: what is called.
        restart: before each trajectory.
        computed: how many steps compute everything.
        stats: moeca's own figures, after a trajectory.
    """

    model: Any
    computed: int
    restart: Callable[[], None] = lambda: None
    stats: Callable[[], dict[str, Any]] = dict

    @torch.no_grad()
    def sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """A trajectory of Euler steps; the velocity is what the model returns first."""
        self.restart()
        timestep = next(name for name in TIMESTEPS if name in inputs)
        x = inputs[LATENTS]
        for step in range(STEPS):
            time = torch.full_like(inputs[timestep], 1000.0 * (1 - step / STEPS))
            output = self.model(**{**inputs, LATENTS: x, timestep: time}, return_dict=False)[0]
            x = x - output / STEPS
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return x


def computed_steps() -> list[int]:
    """Of the schedule: those of the warm-up, then every `INTERVAL`-th."""
    return [*range(WARMUP), *range(WARMUP + INTERVAL - 1, STEPS, INTERVAL)]


def shared(model: nn.Module) -> Any:
    """A copy of the modules, with the same tensors as weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_compiled_blocks(model: Any, quick: bool) -> Any:
    """As diffusers and cache-dit recommend for models with hooks: its repeated blocks, each for itself."""
    if not quick:
        model.compile_repeated_blocks()
    return model


def of_moeca(model: nn.Module, schedule: str, quick: bool, **options: Any) -> Contender:
    """A compiled copy, which reads no guards once it is compiled."""
    compiled = moeca.compile(shared(model), schedule=schedule, inner="eager" if quick else "inductor", **options)
    steps = STEPS if schedule == "full" else len(computed_steps())

    def stats() -> dict[str, Any]:
        found = moeca.stats(compiled)
        return {"state_bytes": found.state_bytes, "hoisted_bytes": found.hoisted_bytes, "macs": found.mac_fraction}

    return Contender(compiled, steps, stats=stats)


def of_cache_dit(model: nn.Module, quick: bool) -> Contender:
    """Its static mask with the schedule's steps, one block computed at cheap ones."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported
    import cache_dit

    steps = computed_steps()
    config = cache_dit.DBCacheConfig(
        num_inference_steps=STEPS, Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_policy="static",
        steps_computation_mask=[int(step in steps) for step in range(STEPS)],
    )  # fmt: skip
    cached = with_compiled_blocks(shared(model), quick)
    cache_dit.enable_cache(cached, cache_config=config)
    return Contender(cached, len(steps), lambda: cache_dit.refresh_context(cached, cache_config=config))


def of_taylorseer(model: nn.Module, quick: bool) -> Contender:
    """diffusers' hooks on its attention modules, order 1. It counts an interval from the step after the warm-up, so a
    warm-up shorter by one makes as many computed steps."""
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    cached = with_compiled_blocks(shared(model), quick)
    cached.enable_cache(
        TaylorSeerCacheConfig(cache_interval=INTERVAL, disable_cache_before_step=WARMUP - 1, max_order=1)
    )
    registry = HookRegistry.check_if_exists_or_initialize(cached)

    def restart() -> None:
        registry.reset_stateful_hooks(recurse=True)
        _set_cache_context(cached, CacheContext("benchmark"))

    steps = [step for step in range(STEPS) if step < WARMUP - 1 or (step - WARMUP) % INTERVAL == 0]
    return Contender(cached, len(steps), restart)


def contenders(model: nn.Module, quick: bool) -> dict[str, Callable[[], Contender]]:
    """By name, how each is made."""
    schedule = f"uniform:{INTERVAL}:warmup={WARMUP}"
    whole: Callable[[nn.Module], Any] = (lambda one: one) if quick else partial(torch.compile, dynamic=False)
    return {
        BASELINE: lambda: Contender(whole(shared(model)), STEPS),
        "moeca, everything computed": lambda: of_moeca(model, "full", quick),
        "moeca, regions": lambda: of_moeca(model, schedule, quick),
        "moeca, the output": lambda: of_moeca(model, schedule, quick, granularity="output"),
        "cache-dit, static mask": lambda: of_cache_dit(model, quick),
        "TaylorSeer (diffusers)": lambda: of_taylorseer(model, quick),
    }


def job(work: Work, quick: bool) -> Iterator[Any]:
    """Compile all contenders, then time them; yields after each."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model, inputs = work.network()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    opened: dict[str, Contender] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, make in contenders(model, quick).items():
        try:
            opened[name], figures[name] = first_runs(make, inputs, weights)
        except Exception as error:  # what a peer can't run is a result, too
            figures[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            opened.pop(name, None)
        print(f"{work.name}: {name}: {figures[name]}", flush=True)
    yield None
    timings: dict[str, Timing] = interleave(
        {name: partial(one.sample, inputs) for name, one in opened.items()}, rounds=work.rounds, warmup=1
    )
    print_table(work.name, timings, BASELINE)
    times = as_json(timings, BASELINE)
    result = {name: {**times.get(name, {}), **found} for name, found in figures.items()}
    yield {"machine": machine(), "weights_bytes": weights, "steps": STEPS, "contenders": result}


def first_runs(
    make: Callable[[], Contender], inputs: Mapping[str, Any], weights: int
) -> tuple[Contender, dict[str, Any]]:
    """A contender after two trajectories: seconds of the first, which compiles, and the peak of memory in the second,
    beside the weights."""
    started = time.perf_counter()
    one = make()
    one.sample(inputs)
    figures: dict[str, Any] = {"computed": one.computed, "first_seconds": round(time.perf_counter() - started, 1)}
    on_gpu = inputs[LATENTS].device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    result = one.sample(inputs)
    if on_gpu:
        figures["peak_beside_weights_bytes"] = torch.cuda.max_memory_allocated() - weights
    figures["finite"] = bool(torch.isfinite(result).all())
    return one, figures | one.stats()


def main(argv: Sequence[str] | None = None) -> None:
    """Run as a command."""
    parser = arguments(__doc__.splitlines()[0], "a narrow model of two blocks")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default all")
    args = parser.parse_args(argv)
    out = folder_of(args)
    if not (torch.cuda.is_available() or args.quick):
        parser.error("there is no GPU here; --quick runs a narrow model on the CPU")
    works = [Work(name, "cuda") for name in args.models]
    if args.quick:
        works = [Work("flux", "cuda" if torch.cuda.is_available() else "cpu", NARROW, rounds=1)]
    file = None if out is None else out / "gpu_full_size.json"
    runs = json.loads(file.read_text())["models"] if file is not None and file.exists() else {}
    for work in works:  # one at a time: two of these models don't fit on a GPU
        for name, result in in_turns({work.name: partial(job, work, args.quick)}):
            runs[name] = result
            if out is not None:
                save("gpu_full_size", {"models": runs}, out)


if __name__ == "__main__":
    main()
