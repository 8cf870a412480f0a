"""`compare` itself: samples the same seeds in each way, in turns, and measures times and distances."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeca_compile.comparison.contenders import CompiledBundle, CompiledModel, Facts
from moeca_compile.comparison.metrics import Metric, Metrics
from moeca_compile.comparison.truth import true_samples
from moeca_compile.errors import OptionError, StateError
from moeca_compile.frontend.prompts import Prompt, PromptSampler, check_seeds, sampler_of, takes
from moeca_compile.inspect.comparison import CACHED, Comparison, Contender
from moeca_compile.inspect.progress import ProgressCallback, bar
from moeca_compile.planner.rollout import TIMESTEPS
from moeca_compile.planner.truth import Truth, read_truth, sample_other
from moeca_compile.runtime.session import Session
from moeca_compile.schedule.decode import short
from moeca_compile.schedule.output import UNCACHED

SAME = 1e-3  # of the samples' range: how far two runs of one seed may differ (kernels that sum in any order)


def compare(
    model: Any,
    sample: Callable[..., Any] | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    call: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | int = 4,
    truth: Truth = UNCACHED,
    metrics: Mapping[str, Metric] | None = None,
    data_range: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Sample the same seeds uncached and cached, and tell the speedup and what it costs in quality.

    The model runs in up to three ways, which take turns: `plain`, its own code in eager mode; `computed`, compiled,
    with every step computed; and `cached`, as it is used. The ratio of the first two is what preparing and compiling
    the graph gives, that of the last two what caching gives. A run for each goes ahead and isn't timed. So this costs
    three runs a seed and three more.

    Args:
        model: a model or pipeline that is compiled with moeca, or a `Session` of a bundle.
        sample: the caller's own loop: `sample(model, seed)` returns the final samples [N, ...], deterministic in
            `seed`. It must call the model that it is given; for a pipeline it may call the pipeline, on which that
            model is set. With two transformers it gets the pipeline, for a list of models a list. For a bundle it gets
            a function of one step, `model({"x": x, ...}, stream="")`, which returns arrays by output name.
        prompts: for a pipeline, in place of `sample`: texts, or mappings with keywords of the pipeline's call such as
            `prompt_embeds`. Seed s draws prompt s modulo their number.
        call: further keywords of the pipeline's call, such as `{"num_inference_steps": 28}`.
        seeds: that are sampled; a number n means 0 to n - 1.
        truth: what the samples are compared with beside the uncached ones: `converged`, the samples that the sampler
            comes to with more and more steps, for which `sample` must take a keyword `steps`; a mapping from seeds to
            tensors; a function of the seed; or another model (a module or a pipeline; two modules for a loop of two),
            such as the same one before its weights were quantized.
        metrics: more metrics by name: functions of samples and truth, both [N, ...] float32, that return N numbers.
        data_range: of the samples, for PSNR and SSIM; None: 1 with prompts, else the range of the uncached samples.
        progress: show a progress bar on stderr, where that is a terminal and `rich` is installed.

    Returns:
        Seconds, speedups, share of the MACs, and the metrics: PSNR in dB, SSIM (with scikit-image), LPIPS (with lpips).
        It prints as a table.

    Raises:
        StateError: the model isn't compiled with moeca, or the schedule cached nothing, so that there is nothing to
            compare; the message says why.
        OptionError: an argument that can't be used, or samples that don't depend on the seed alone, have different
            shapes, or aren't finite.
    """
    numbers = _seeds(seeds)
    compared = CompiledBundle(model) if isinstance(model, Session) else CompiledModel(model)
    sampler = sampler_of(model, sample, prompts, call, "compare")
    check_seeds(sampler, len(numbers), "compare")
    goal = read_truth(
        truth, sampler, numbers, "compare", OptionError,
        lambda other, seed: sample_other(other, model, sampler, seed, "compare"),
    )  # fmt: skip
    names = list(compared.ways)
    with bar(progress) as report_progress:
        runner = _Runner(compared, sampler, len(names) * (1 + len(numbers)), report_progress)
        # the cached run goes first: it says where nothing is cached, and there the graph may not be computed apart
        first = {name: runner.run(name, numbers[0]) for name in reversed(names)}
        samples: dict[str, list[Tensor]] = {name: [] for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for seed in numbers:
            for name in names:
                spent, drawn = runner.run(name, seed)
                samples[name].append(drawn)
                seconds[name].append(spent)
        uncached = samples[names[0]]
        _check_repeats(first[names[0]][1], uncached[0])
        truths = {UNCACHED: uncached}
        if goal != UNCACHED:
            label = goal if isinstance(goal, str) else "given"
            steps = runner.facts.steps
            truths[label] = true_samples(
                goal, numbers, uncached, lambda seed, times: runner.run(names[0], seed, times * steps)[1]
            )
    low, high = (float(extreme) for extreme in torch.cat([each.flatten() for each in uncached]).aminmax())
    if data_range is None:
        data_range = 1.0 if isinstance(sampler, PromptSampler) else max(high - low, 1e-12)
    measured = Metrics(data_range, low if sample is not None else 0.0, metrics or {})
    joined = {name: torch.cat(each) for name, each in {**samples, **truths}.items()}
    contenders = []
    for name in names:
        compared_with = [label for label in truths if not (label == UNCACHED and name == names[0])]
        quality = {label: measured.of(joined[name], joined[label]) for label in compared_with}
        contenders.append(Contender(name, tuple(seconds[name]), first[name][0], quality))
    facts = runner.facts
    return Comparison(
        model=compared.name,
        seeds=numbers,
        schedule=facts.schedule,
        contenders=tuple(contenders),
        mac_fraction=facts.mac_fraction,
        state_bytes=facts.state_bytes,
        data_range=data_range,
        notes=tuple(measured.notes.values()),
        samples={name: each.numpy() for name, each in joined.items()},
    )


class _Runner:
    """Runs a sampler in the ways of a compared model.

    Args:
        compared: the model.
        sampler: of `compare`.
        runs: how many there will be, those for a truth not counted.
        report_progress: called before each run with what is run, and the share of the runs that is done.

    Attributes:
        facts: of the last cached run.
    """

    def __init__(
        self, compared: CompiledModel | CompiledBundle, sampler: Callable[..., Any], runs: int,
        report_progress: ProgressCallback,
    ) -> None:  # fmt: skip
        self._compared, self._sampler = compared, sampler
        self._runs, self._done, self._report_progress = runs, 0, report_progress
        self.facts = compared.facts()

    def run(self, name: str, seed: int, steps: int | None = None) -> tuple[float, Tensor]:
        """Seconds and samples of one seed. `steps`: of the sampler; None: its own. Searched timesteps of the schedule
        are passed to the sampler of a cached run, if it takes some.

        Raises:
            OptionError: the samples aren't a tensor of finite numbers.
            StateError: nothing was cached.
        """
        first = "first run, " if self._done < len(self._compared.ways) else ""
        text = f"{first}{name}, seed {seed}" if steps is None else f"{name}, seed {seed}, {steps} steps"
        self._report_progress(text, self._done / self._runs)
        self._done += 1
        keywords: dict[str, Any] = {} if steps is None else {"steps": steps}
        if name == CACHED and self._compared.timesteps and takes(self._sampler, TIMESTEPS):
            keywords[TIMESTEPS] = list(self._compared.timesteps)
        with torch.no_grad(), self._compared.running(name) as model:
            begin = time.perf_counter()
            drawn = self._sampler(model, seed, **keywords)
            drawn = _checked(drawn, seed)  # copied to the host, so that the device has finished
            spent = time.perf_counter() - begin
        if name == CACHED:
            self.facts = self._compared.facts()
            _check_cached(self.facts)
        return spent, drawn


def _checked(samples: Any, seed: int) -> Tensor:
    """Samples as a tensor [N, ...] float32 on the CPU."""
    if not isinstance(samples, Tensor) and not hasattr(samples, "__array__"):
        raise OptionError(
            f"compare: sample(model, seed) gave a {type(samples).__name__}, expected a tensor or array of samples"
        )
    drawn = torch.as_tensor(samples).detach().float().cpu()
    if not drawn.dim():
        raise OptionError("compare: sample(model, seed) gave one number, expected samples [N, ...]")
    if not bool(drawn.isfinite().all()):
        raise OptionError(f"compare: the samples of seed {seed} aren't finite. Run the model in bfloat16 or float32")
    return drawn.clone()


def _check_repeats(first: Tensor, again: Tensor) -> None:
    """Refuse samples of one seed that differ between two runs."""
    if first.shape != again.shape:
        problem = f"shapes {list(first.shape)} and {list(again.shape)}"
    elif float((first - again).abs().max()) > SAME * max(float(first.max() - first.min()), 1e-12):
        problem = "two results"
    else:
        return
    raise OptionError(
        f"compare: sample(model, seed) gave {problem} for one seed; it must depend on its seed alone: draw all noise "
        "from a generator that is seeded with it"
    )


def _check_cached(facts: Facts) -> None:
    """Refuse to compare a model with itself."""
    if facts.uncached:
        raise StateError(f"compare: nothing is cached. {facts.uncached}")
    if not facts.steps:
        raise StateError(
            "compare: sample(model, seed) never called the model that it was given, or calls another one. A loop that "
            "calls a pipeline of its own begins with `pipe.transformer = model`"
        )


def _seeds(seeds: Sequence[int] | int) -> tuple[int, ...]:
    try:
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            numbers = tuple(range(seeds))
        else:
            numbers = () if isinstance(seeds, (str, bytes, bool)) else tuple(map(operator.index, seeds))
    except TypeError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers):
        raise OptionError(f"compare: seeds={short(seeds)}, expected a number above 0, or different whole numbers")
    return numbers
