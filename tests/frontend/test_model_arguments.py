"""What may be handed over for a model: pipelines, what is compiled already, methods run past a handle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning, OptionError, StateError
from moeca_compile.expert_dispatch.isolate import isolated
from tests.models import DiT

TIMES = (900.0, 700.0, 500.0, 300.0)
EAGER: dict[str, Any] = {"schedule": "uniform:2", "order": 0, "inner": "eager"}


class Guided(DiT):
    factor = 2.0

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(x, t, y) * self.factor

    @torch.no_grad()
    def called(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(x, t, y)

    def twice(self, *inputs: Tensor) -> Tensor:
        return self.forward_with_cfg(*inputs) * 2

    def with_super(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)

    def width(self) -> int:
        return self.channels


class Pipeline:
    def __init__(self, *models: torch.nn.Module) -> None:
        self.transformer = models[0]
        self.transformer_2 = models[1] if len(models) > 1 else None

    def __call__(self, seed: int = 0) -> Tensor:
        return sample(self.transformer, seed)


def model(seed: int = 0) -> Guided:
    torch.manual_seed(seed)
    return Guided(depth=1).eval().requires_grad_(False)


def inputs(time: float = 900.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((2,), time), torch.tensor([1, 2])


def sample(called: Any, seed: int = 0) -> Tensor:
    x, _, y = inputs(seed=seed)
    with torch.no_grad():
        for time in TIMES:
            x = x - 0.1 * called(x, torch.full((2,), time), y)
    return x


def variants(compiled: Any) -> list[str]:
    return [record.variant for record in moeca.stats(compiled).steps]


CACHED = ["v0", "v1", "v0", "v1"]


# -- pipelines --------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_compiled_in_its_transformers() -> None:
    plain, other = model(), model(1)
    truth = sample(plain)
    pipe = Pipeline(plain, other)
    assert moeca.compile(pipe, schedule="full", inner="eager") is pipe
    assert isinstance(pipe.transformer, torch._dynamo.OptimizedModule)
    assert pipe.transformer is not plain
    assert isinstance(pipe.transformer_2, torch._dynamo.OptimizedModule)
    with moeca.trajectory(pipe, steps=len(TIMES)):
        assert torch.equal(pipe(), truth)
    sample(pipe.transformer_2)
    assert len(moeca.stats(pipe).steps) == len(TIMES)  # of the last trajectory
    moeca.reset(pipe)
    assert moeca.stats(pipe).steps == ()
    assert moeca.disable(pipe) is pipe
    assert pipe.transformer is plain
    assert pipe.transformer_2 is other


def test_a_pipeline_s_only_transformer_is_the_model() -> None:
    pipe = moeca.compile(Pipeline(model()), **EAGER)
    assert torch.isfinite(moeca.warmup(pipe, *inputs())).all()
    assert len(moeca.explain(pipe, *inputs()).regions) == 2
    pipe()
    assert variants(pipe) == CACHED


def test_of_two_transformers_one_must_be_said() -> None:
    pipe = Pipeline(model(), model(1))
    with pytest.raises(StateError, match=r"2 transformers.*pipe\.transformer, \.\.\.\) or .*pipe\.transformer_2"):
        moeca.explain(pipe, *inputs())
    with pytest.raises(StateError, match=r"warmup: nothing was compiled"):
        moeca.warmup(pipe, *inputs())
    with pytest.raises(OptionError, match=r"fits what one model returns, and there are 2 here"):
        moeca.calibrate(pipe, sample, budget="macs:0.6", granularity="output", progress=False)


def test_calibrate_samples_a_pipeline_with_what_it_compiled() -> None:
    plain = model()
    pipe = Pipeline(plain)
    schedule = moeca.calibrate(
        pipe, lambda _, seed: pipe(seed), budget="macs:0.7", seeds=2, holdout=0, order=0, granularity="region",
        inner="eager", progress=False,
    )  # fmt: skip
    assert len(schedule.rows) == len(TIMES)
    assert pipe.transformer is plain


def test_a_pipeline_is_prepared_in_its_transformers() -> None:
    pipe = Pipeline(model(), model(1))
    assert len(moeca.prepare(pipe).changed) == 2
    moeca.unprepare(pipe)
    assert not isolated(pipe.transformer)


def test_a_diffusers_pipeline_is_compiled() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert moeca.compile(pipe, **EAGER) is pipe
    assert pipe.transformer.dtype is torch.float32
    assert pipe.transformer.config.sample_size == 8
    with moeca.trajectory(pipe, steps=4):
        pipe([1], guidance_scale=1.0, num_inference_steps=4, output_type="np")
    assert variants(pipe) == CACHED
    assert moeca.disable(pipe).transformer is transformer


# -- compiled already -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moeca", "torch", "in place", "both"])
def test_compiling_twice_replaces(how: str) -> None:
    plain = model()
    first: Any = plain
    if how in ("in place", "both"):
        plain.compile(backend="moeca", options={"inner": "eager"})
    if how == "moeca":
        first = moeca.compile(plain, inner="eager")
    if how in ("torch", "both"):
        first = torch.compile(plain, backend="moeca", options={"inner": "eager"})
    compiled = moeca.compile(first, **EAGER)
    assert compiled._orig_mod is plain
    assert plain._compiled_call_impl is None
    sample(compiled)
    assert variants(compiled) == CACHED
    assert compiled.channels == 4


def test_disable_gives_the_plain_model_back() -> None:
    plain = model()
    truth = sample(plain)
    names = set(plain.__dict__)
    compiled = moeca.compile(plain, **EAGER)
    sample(compiled)
    assert moeca.disable(compiled) is plain
    assert not isolated(plain)
    assert set(plain.__dict__) == names | {"_is_torch_compile"}  # torch's own mark
    assert torch.equal(sample(plain), truth)
    assert moeca.disable(plain) is plain
    plain.compile(backend="moeca", options=EAGER)
    assert moeca.disable(plain) is plain
    assert plain._compiled_call_impl is None


def test_disable_gives_the_plain_function_back() -> None:
    assert moeca.disable(torch.compile(sample, backend="moeca")) is sample
    assert moeca.disable(sample) is sample


@pytest.mark.slow
def test_calibrate_leaves_a_model_compiled_in_place() -> None:
    plain = model()
    plain.compile(backend="moeca", options=EAGER)
    held = plain._compiled_call_impl
    moeca.calibrate(
        plain, sample, budget="macs:0.7", seeds=2, holdout=0, order=0, granularity="region", inner="eager",
        progress=False,
    )  # fmt: skip
    assert plain._compiled_call_impl is held


@pytest.mark.parametrize("use", [moeca.stats, moeca.reset, moeca.trajectory])
def test_what_isn_t_compiled_with_moeca_is_refused(use: Any) -> None:
    others = model(), torch.compile(model(), backend="eager"), SimpleNamespace(), Pipeline(model()), object()
    for other in others:
        with pytest.raises(StateError, match="isn't compiled with moeca"):
            use(other)


@pytest.mark.parametrize("use", [moeca.compile, moeca.prepare, moeca.unprepare])
def test_what_is_no_model_is_refused(use: Any) -> None:
    with pytest.raises(StateError, match=r"expected a torch\.nn\.Module, or a pipeline"):
        use(sample)


@pytest.mark.parametrize("way", ["prepared", "inside", "forward"])
def test_what_holds_a_compiled_model_is_taken(way: str) -> None:
    plain: Any = model()
    if way == "prepared":
        moeca.prepare(plain)
    if way == "inside":
        plain = torch.nn.Sequential(torch.compile(plain, backend="moeca"))
    if way == "forward":
        plain.forward = torch.compile(plain.forward, backend="moeca")
    assert moeca.stats(plain).steps == ()
    assert moeca.trajectory(plain)


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("forward_with_cfg", 2),
        pytest.param("called", 1, marks=pytest.mark.slow),
        pytest.param("twice", 4, marks=pytest.mark.slow),
    ],
)
def test_methods_that_call_forward_are_cached(name: str, factor: int) -> None:
    plain = model()
    x, _, y = inputs()
    for schedule, expected in (("full", ["v0"] * 4), ("uniform:2", CACHED)):
        compiled = moeca.compile(plain, schedule=schedule, order=0, inner="eager")
        with torch.no_grad(), moeca.trajectory(compiled, steps=len(TIMES)):
            for time in TIMES:
                t = torch.full((2,), time)
                out = getattr(compiled, name)(x, t, y)
                if schedule == "full":
                    assert torch.equal(out, plain(x, t, y) * factor)
        assert variants(compiled) == expected
    assert compiled.width() == 4


@pytest.mark.parametrize("name", ["forward_with_cfg", "with_super"])
def test_methods_run_past_a_handle_are_told_of(name: str) -> None:
    plain = model()
    if name == "with_super":
        compiled = moeca.compile(plain, **EAGER)
    else:
        compiled = torch.compile(plain, backend="moeca", options=EAGER)  # type: ignore[assignment]
    with torch.no_grad(), pytest.warns(MoecaWarning, match=r"no call .*forward_with_cfg, backend"):  # noqa: SIM117
        with moeca.trajectory(compiled, steps=1):
            getattr(compiled, name)(*inputs())
    assert "no call came through this handle" in str(moeca.stats(compiled))


@pytest.mark.parametrize("way", ["the pipeline", "its method"])
def test_a_pipeline_given_to_torch_is_told_what_compiles_it(way: str) -> None:
    pipe = Pipeline(model())
    truth = pipe()
    compiled = torch.compile(pipe if way == "the pipeline" else pipe.__call__, backend="moeca", options=EAGER)
    with pytest.warns(MoecaWarning) as warned:
        assert torch.allclose(compiled(), truth, rtol=1e-5, atol=1e-6)
    (text,) = [str(warning.message) for warning in warned]
    assert "torch.compile got a Pipeline, whose loop is no model. Use moeca_compile.compile(pipeline, ...)" in text
    assert text.endswith("which compiles its transformer")


def test_calls_of_a_trajectory_inside_another_are_calls() -> None:
    compiled = moeca.compile(model(), **EAGER)
    with moeca.trajectory(compiled), moeca.trajectory(compiled, stream="inner"):
        sample(compiled)
    assert "no call" not in str(moeca.stats(compiled))


def test_a_first_call_that_only_prepares_is_a_call() -> None:
    plain = model()
    plain.blocks[0].register_forward_hook(lambda *_: None)
    compiled = torch.compile(plain, backend="moeca", options=EAGER)
    stream = moeca.trajectory(compiled, stream="one")
    with torch.no_grad():
        for time in TIMES:
            with stream:
                compiled(*inputs(time))
    assert moeca.stats(compiled).steps


# -- explain's keywords -----------------------------------------------------------------------------------------------


class Takes(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, **others: Any) -> Tensor:
        return super().forward(x, t, y)


@pytest.mark.slow
def test_explain_takes_the_model_s_keywords() -> None:
    x, t, y = inputs()
    for one in (model(), moeca.compile(model(), **EAGER)):
        report = moeca.explain(one, x, t=t, y=y, inner="eager", schedule="uniform:3")
        assert len(report.regions) == 2
        assert len(moeca.explain(one, x, keywords={"t": t, "y": y}, inner="eager").regions) == 2


def test_explain_refuses_a_keyword_that_is_neither() -> None:
    with pytest.raises(OptionError, match="did you mean 'schedule'"):
        moeca.explain(model(), *inputs(), schedul="full")
    with pytest.raises(OptionError, match=r"did you mean 'granularity'\? If the model takes it: keywords="):
        moeca.explain(Takes(depth=1).eval(), *inputs(), granularty="region")
    x, t, y = inputs()
    assert len(moeca.explain(Takes(depth=1).eval(), x, t=t, y=y, image=None, inner="eager").regions) == 2
