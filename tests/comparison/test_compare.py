"""`compare`: speeds and distances of a cached model beside its uncached self, and what can't be compared."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.comparison.metrics import Metrics
from moeca_compile.errors import OptionError, StateError, UserError
from moeca_compile.inspect.comparison import Comparison, Contender
from tests.docs import world


def compiled(**options: Any) -> Any:
    return moeca.compile(world.model(), inner="eager", **({"schedule": "uniform:3"} | options))


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled()


@pytest.fixture(scope="module")
def comparison(model: Any) -> Comparison:
    return moeca.compare(model, world.sample, seeds=3)


def figures(plain: float, computed: float, cached: float) -> Comparison:
    quality = {"uncached": {"psnr_db": (50.0, 46.0)}}
    contenders = (
        Contender("plain", (plain,), 2.0),
        Contender("computed", (computed,), 2.0, {"uncached": {"psnr_db": (150.0, 150.0)}}),
        Contender("cached", (cached, cached * 3, cached), 2.0, quality),
    )
    return Comparison("DiT", (0, 1), "uniform:3, order 1", contenders, 0.344, 2**20, 1.0, ("ssim is left out: why",))


def test_speedups_are_ratios_of_medians_with_both_halves_apart() -> None:
    text = str(figures(3.0, 2.0, 1.0))
    assert "3.00 times as fast (graph 1.50, caching 2.00), 48.0 dB from uncached, worst 46.0 dB" in text
    assert text.endswith("ssim is left out: why")
    assert "seconds: medians of interleaved runs; speedup: the ratio of these medians" in text
    table = [line.split() for line in text.split("\n")[1:5]]
    assert table == [
        ["seconds", "speedup", "MACs", "psnr_db"],
        ["plain", "3.000", "1.00", "100.0%"],
        ["computed", "2.000", "1.50", "100.0%", "150"],
        ["cached", "1.000", "3.00", "34.4%", "48"],
    ]


def test_the_cached_samples_are_compared_with_the_model_s_own(model: Any, comparison: Comparison) -> None:
    plain = [world.sample(world.model(), seed) for seed in range(3)]
    cached = [world.sample(model, seed) for seed in range(3)]
    assert np.array_equal(comparison.samples["plain"], torch.cat(plain).numpy())
    assert np.array_equal(comparison.samples["cached"], torch.cat(cached).numpy())
    span = float(torch.cat(plain).max() - torch.cat(plain).min())
    assert comparison.data_range == pytest.approx(span)
    errors = (torch.cat(plain) - torch.cat(cached)).square().flatten(1).mean(1)
    assert comparison.psnr_db == pytest.approx(float((10 * torch.log10(span**2 / errors)).mean()), abs=1e-3)
    assert comparison.mean("psnr_db", contender="computed") > comparison.psnr_db + 20
    assert comparison.mac_fraction == moeca.stats(model).mac_fraction < 1
    assert [contender.name for contender in comparison.contenders] == ["plain", "computed", "cached"]
    assert [len(contender.seconds) for contender in comparison.contenders] == [3, 3, 3]
    assert min(contender.first_seconds for contender in comparison.contenders) > 0


def test_the_comparison_is_json(comparison: Comparison) -> None:
    data = json.loads(comparison.to_json())
    assert data == json.loads(json.dumps(comparison.to_dict()))
    assert data["speedup"] == comparison.speedup
    assert data["contenders"][2]["quality"]["uncached"]["psnr_db"]["mean"] == pytest.approx(comparison.psnr_db)


def test_the_model_is_left_as_it_was(model: Any, comparison: Comparison) -> None:
    before = world.sample(model, 5)
    moeca.compare(model, world.sample, seeds=[7])
    assert torch.equal(world.sample(model, 5), before)
    assert [step.variant for step in moeca.stats(model).steps].count("v0") == 3


@pytest.mark.slow
def test_a_model_that_is_compiled_in_place_is_compared() -> None:
    plain = world.model()
    plain.compile(backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    compiled_call = plain._compiled_call_impl
    comparison = moeca.compare(plain, world.sample, seeds=1)
    assert plain._compiled_call_impl is compiled_call
    assert comparison.mac_fraction < 1


def test_a_model_s_output_is_compared() -> None:
    comparison = moeca.compare(compiled(granularity="output"), world.sample, seeds=1)
    assert comparison.mac_fraction == pytest.approx(3 / 8)
    assert comparison.mean("psnr_db", contender="computed") == 150.0


def test_each_run_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float]] = []

    @contextmanager
    def recording(show: bool) -> Iterator[Any]:
        yield lambda text, share: told.append((text, share)) if show else None

    monkeypatch.setattr("moeca_compile.comparison.entry.bar", recording)
    moeca.compare(model, world.sample, seeds=[7], truth="converged", progress=True)
    assert [text for text, _ in told] == [
        "first run, cached, seed 7", "first run, computed, seed 7", "first run, plain, seed 7",
        "plain, seed 7", "computed, seed 7", "cached, seed 7", "plain, seed 7, 16 steps", "plain, seed 7, 32 steps",
    ]  # fmt: skip
    assert [share for _, share in told[:6]] == pytest.approx([number / 6 for number in range(6)])
    told.clear()
    moeca.compare(model, world.sample, seeds=[7], progress=False)
    assert told == []


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pipeline_is_compared_by_prompts() -> None:
    pipe = world.Pipeline()
    moeca.compile(pipe, schedule="uniform:3", inner="eager")
    handle = pipe.transformer
    comparison = moeca.compare(pipe, prompts=["a fox", "a hare"], call={"num_inference_steps": 6}, seeds=2)
    assert pipe.transformer is handle
    assert comparison.model == "Pipeline"
    assert comparison.data_range == 1.0
    assert len(moeca.stats(pipe).steps) == 6
    assert comparison.samples["cached"].shape == (6, 2, 4, 4)
    by_function = moeca.compare(
        pipe, lambda model, seed: torch.stack(pipe(generator=torch.Generator().manual_seed(seed)).images), seeds=1
    )
    assert by_function.mac_fraction < 1


@pytest.mark.slow
def test_after_a_comparison_a_disabled_pipeline_is_forgotten_at_once() -> None:
    pipe = world.Pipeline()
    moeca.compile(pipe, schedule="uniform:3", inner="eager")
    moeca.compare(pipe, prompts=["a fox"], call={"num_inference_steps": 6}, seeds=1)
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        moeca.compare(pipe, prompts=["a fox"], call={"num_inference_steps": 6}, seeds=1)
        handle = weakref.ref(pipe.transformer)
        moeca.disable(pipe)
        assert handle() is None
        with pytest.raises(StateError, match="isn't compiled with moeca"):
            moeca.stats(pipe)
        with pytest.raises(StateError, match="isn't compiled with moeca"):
            moeca.compare(pipe, prompts=["a fox"], seeds=1)
    finally:
        gc.enable()


@pytest.mark.slow
def test_of_two_transformers_each_has_its_schedule() -> None:
    pipe = world.Pipeline()
    pipe.transformer_2 = world.model()
    moeca.compile(pipe, schedule="uniform:2", inner="eager")

    def sample(pipeline: Any, seed: int) -> Tensor:
        assert pipeline is pipe
        return world.sample(pipe.transformer, seed) + world.sample(pipe.transformer_2, seed)

    assert moeca.compare(pipe, sample, seeds=1).mac_fraction < 1


def test_a_list_of_models_is_compared_as_a_list() -> None:
    models = moeca.compile([world.model(), world.model()], schedule="uniform:2", inner="eager")

    def sample(called: Any, seed: int) -> Tensor:
        assert isinstance(called, list)
        return world.sample(called[0], seed)

    comparison = moeca.compare(models, sample, seeds=1)
    assert comparison.model == "DiT and DiT"
    assert np.array_equal(comparison.samples["plain"], world.sample(world.model(), 0).numpy())
    assert comparison.psnr_db < 150


# -- truths and metrics -----------------------------------------------------------------------------------------------


def test_both_truths_are_told(model: Any) -> None:
    comparison = moeca.compare(model, world.sample, seeds=1, truth="converged")
    fine = world.sample(world.model(), 0, 16 * world.STEPS)
    to_fine = np.square(comparison.samples["converged"] - fine.numpy()).mean()
    assert to_fine < np.square(comparison.samples["plain"] - fine.numpy()).mean() / 10
    for contender in comparison.contenders:
        assert "psnr_db" in contender.quality["converged"]
    assert "psnr_db to converged" in str(comparison)


def test_samples_of_one_s_own_are_a_truth(model: Any) -> None:
    own = world.sample(world.model(), 0) + 0.5
    comparison = moeca.compare(model, world.sample, seeds=1, truth={0: own}, data_range=1.0)
    assert comparison.mean("psnr_db", "given", "plain") == pytest.approx(6.02, abs=0.01)
    assert moeca.compare(model, world.sample, seeds=1, truth=lambda seed: own).mean("psnr_db", "given") < 40


def test_metrics_of_one_s_own(model: Any) -> None:
    metrics = {"l1": lambda samples, truth: (samples - truth).abs().flatten(1).mean(1), "one": lambda a, b: 1.0}
    comparison = moeca.compare(model, world.sample, seeds=1, metrics=metrics)
    difference = np.abs(comparison.samples["plain"] - comparison.samples["cached"]).mean()
    assert comparison.mean("l1") == pytest.approx(float(difference), rel=1e-5)
    assert "l1" in str(comparison)
    with pytest.raises(OptionError, match=r"the metric 'two' gave 2 values for 3 samples"):
        moeca.compare(model, world.sample, seeds=1, metrics={"two": lambda a, b: [1.0, 2.0]})


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_ssim_is_scikit_image_s() -> None:
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a, b = images(0, 2, 3, 16, 16), images(1, 2, 3, 16, 16)
    values = Metrics(1.0, 0.0, {}).of(a, b)["ssim"]
    assert values[1] == pytest.approx(similarity(a[1].numpy(), b[1].numpy(), data_range=1.0, channel_axis=0))
    assert Metrics(1.0, 0.0, {}).of(a[:, None], b[:, None])["ssim"] == pytest.approx(values)  # videos of one frame
    assert "ssim" not in Metrics(1.0, 0.0, {}).of(a[..., :4], b[..., :4])


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    metrics = Metrics(1.0, 0.0, {})
    assert list(metrics.of(images(0, 1, 3, 16, 16), images(1, 1, 3, 16, 16))) == ["psnr_db"]
    assert [*metrics.notes.values()] == [
        "ssim is left out: pip install scikit-image",
        "lpips is left out: pip install lpips",
    ]


def test_lpips_gets_rgb_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
            calls.append((a.shape, float(a.min()), float(a.max()), normalize))
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    a, b = 2 * images(0, 2, 1, 8, 8) - 1, 2 * images(1, 2, 1, 8, 8) - 1
    values = Metrics(2.0, -1.0, {}).of(a, b)["lpips"]
    assert values == pytest.approx([float((x - y).abs().mean() / 2) for x, y in zip(a, b, strict=True)])
    assert {(shape, normalize) for shape, _, _, normalize in calls} == {((1, 3, 8, 8), True)}
    assert 0 <= min(call[1] for call in calls) <= max(call[2] for call in calls) <= 1


def test_lpips_without_its_weights_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no route to the weights")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=refuse))
    metrics = Metrics(1.0, 0.0, {})
    metrics.of(images(0, 1, 1, 8, 8), images(1, 1, 1, 8, 8))
    assert metrics.notes["lpips"] == "lpips is left out: no route to the weights"


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (6, 1, 8, 8), (1, 4, 8, 8), (1, 3, 3, 8, 8)])
def test_a_picture_has_pairs_and_their_difference(shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from moeca_compile.inspect.pairs import pairs

    a, b = images(0, *shape).numpy(), images(1, *shape).numpy()
    figure = pairs(a, b)
    assert len(figure.axes) == 3 * min(len(a), 4)
    assert figure.axes[2].get_title().startswith("difference, white is ")
    shown = figure.axes[2].images[0].get_array()
    middle = (slice(None), len(a[0]) // 2) if len(shape) == 5 else slice(None)
    assert np.allclose(shown, np.abs(a[middle] - b[middle])[0].mean(0))


def test_the_picture_of_a_comparison_is_a_file(comparison: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = comparison.save_picture(tmp_path / "pairs.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        comparison.save_picture(tmp_path / "pairs.bmp")


def test_vectors_have_no_picture() -> None:
    from moeca_compile.inspect.pairs import pairs

    with pytest.raises(UserError, match=r"a picture needs samples \[N, C, H, W\].*these are \[2, 8\]"):
        pairs(np.zeros((2, 8)), np.zeros((2, 8)))


# -- what can't be compared -------------------------------------------------------------------------------------------


def test_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(StateError, match="compare: this DiT isn't compiled with moeca"):
        moeca.compare(world.model(), world.sample)
    with pytest.raises(StateError, match="compare: a compiled function has no plain model"):
        moeca.compare(torch.compile(lambda x: x, backend="moeca"), world.sample)


def test_a_sampler_that_calls_another_model_is_refused(model: Any) -> None:
    fresh, other = compiled(), world.model()
    with pytest.raises(StateError, match=r"compare: sample\(model, seed\) never called the model"):
        moeca.compare(fresh, lambda _, seed: world.sample(other, seed), seeds=1)


@pytest.mark.filterwarnings("ignore::moeca_compile.errors.MoecaWarning")
def test_a_model_that_runs_uncached_is_refused() -> None:
    linear = moeca.compile(torch.nn.Linear(4, 4).eval().requires_grad_(False), schedule="uniform:3", inner="eager")
    with pytest.raises(StateError, match=r"compare: nothing is cached. .*nothing to cache was found"):
        moeca.compare(linear, lambda model, seed: model(torch.full((2, 4), float(seed))), seeds=1)


def returns(value: Any) -> Any:
    return lambda model, seed: (world.sample(model, seed), value)[1]


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (lambda model, seed: world.sample(model, seed) + torch.rand(1), "gave two results for one seed"),
        (returns("text"), "gave a str, expected a tensor"),
        (returns(torch.tensor(1.0)), "gave one number"),
        (returns(torch.full((2, 2), torch.nan)), "samples of seed 0 aren't finite"),
        ("a fox", "sample is str, expected a function"),
        (None, "give sample, a function of"),
    ],
)
def test_samplers_that_are_none(model: Any, sample: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        moeca.compare(model, sample, seeds=1)


def test_samples_of_two_shapes_are_refused(model: Any) -> None:
    sizes = iter(range(2, 20))

    def sample(called: Any, seed: int) -> Tensor:
        world.sample(called, seed)
        return torch.zeros(next(sizes), 2)

    with pytest.raises(OptionError, match=r"gave shapes \[4, 2\] and \[5, 2\] for one seed"):
        moeca.compare(model, sample, seeds=1)


@pytest.mark.parametrize("seeds", [0, -1, True, "3", [1, 1], [0.5], None])
def test_seeds_that_are_none(model: Any, seeds: Any) -> None:
    with pytest.raises(OptionError, match="compare: seeds="):
        moeca.compare(model, world.sample, seeds=seeds)


def test_truths_that_are_none(model: Any) -> None:
    with pytest.raises(OptionError, match="compare: truth='best', expected one of uncached, converged"):
        moeca.compare(model, world.sample, truth="best")
    with pytest.raises(OptionError, match=r"but sample.*takes none: give it a keyword steps"):
        moeca.compare(model, lambda called, seed: world.sample(called, seed), truth="converged")
    with pytest.raises(OptionError, match="truth has no samples for seed 0"):
        moeca.compare(model, world.sample, seeds=1, truth={1: torch.zeros(1)})
    with pytest.raises(OptionError, match=r"truth gives for seed 0 have shape \[1\], the sampler's \[3, 2, 4, 4\]"):
        moeca.compare(model, world.sample, seeds=1, truth={0: torch.zeros(1)})
