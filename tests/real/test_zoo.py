"""Real model code through both front doors: found, cached, exported as it must be."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import moeca_compile as moeca
from moeca_compile.engine.intercept import intercepting
from moeca_compile.engine.program import Program
from moeca_compile.errors import MoecaWarning
from tests.facts import Recorder
from tests.following import gathered
from tests.real.tiny import Model
from tests.real.zoo import ZOO, nucleus, nucleus_inputs
from tests.reference import Reference
from tests.tools import same

STEPS = 8
FAST = ("PixArt",)
CLOSE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*expert dispatches are left as they are"),  # Nucleus' can be traced
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),  # its rotary embedding
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's
]


def named(*names: str, fast: tuple[str, ...] = FAST) -> Any:
    """The models of these names; all but a few are for `make test-slow`."""
    given = [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]
    return pytest.mark.parametrize("name", given)


WHOLE = tuple(name for name, model in ZOO.items() if not model.in_parts)


def tensors(result: Any) -> list[Tensor]:
    """What a model gave: a tensor, or a dataclass or a tuple of tensors and lists of them."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [value for value in tree_leaves(tuple(values)) if isinstance(value, Tensor)]


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative error, by norms."""
    pairs = zip(left, right, strict=True)
    return max(float((a - b).double().norm() / b.double().norm()) for a, b in pairs)


def eager(name: str, steps: int = STEPS) -> list[list[Tensor]]:
    model, case = build(name), ZOO[name]
    with torch.no_grad():
        return [tensors(model(**case.inputs(step))) for step in range(steps)]


def build(name: str) -> nn.Module:
    return ZOO[name].build()


@contextmanager
def programs() -> Iterator[list[tuple[Program, tuple[Any, ...]]]]:
    """Calls in here run whole and uncached, and leave the program and its arguments."""
    seen: list[tuple[Program, tuple[Any, ...]]] = []

    def look(entry: Any, args: Sequence[Any], runtime: Any) -> tuple[Any, ...]:
        program, placed = entry.place(args, runtime)
        seen.append((program, tuple(placed)))
        return tuple(entry.gm(*args))

    with intercepting(look):
        yield seen


class Run:
    """Three trajectories of a model compiled as users do, without any help."""

    def __init__(self, name: str) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.case: Model = ZOO[name]
        self.model = torch.compile(
            build(name), backend="moeca", options={"schedule": "uniform:3", "order": 1, "inner": "eager"}
        )
        self.outputs, self.frames = [], []
        with torch.no_grad():
            for _ in range(3):
                found = [tensors(self.model(**self.case.inputs(step))) for step in range(STEPS)]
                self.outputs.append(found)
                self.frames.append(torch._dynamo.utils.counters["frames"]["ok"])
            self.stats = moeca.stats(self.model)
            with programs() as seen:
                for step in range(STEPS):
                    self.model(**self.case.inputs(step))
        self.programs = {id(program): program for program, _ in seen}
        self.program = seen[0][0]
        self.args = [args for _, args in seen]


@cache
def run(name: str) -> Run:
    return Run(name)


def row_of(name: str) -> str:
    return f"diffusers: {name}"


def shown(report: Any) -> list[str]:
    return [one.kind + (f" x{len(one.outputs)}" if len(one.outputs) > 1 else "") for one in report]


COMPILED = ("DiT", "Flux", "HiDreamImage", "PixArt", "QwenImage", "SD3", "Wan")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")  # Qwen's
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_by_inductor_it_gives_what_the_interpreter_gives(name: str) -> None:
    expected = run(name)
    torch._dynamo.reset()
    model = moeca.compile(build(name), schedule="uniform:3", order=1)
    frames = []
    with torch.no_grad():
        for _ in range(2):
            found = [tensors(model(**expected.case.inputs(step))) for step in range(STEPS)]
            frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] == frames[1]
    for step, outputs in enumerate(found):
        assert distance(outputs, expected.outputs[1][step]) < 10 * CLOSE, f"step {step}"


# -- torch.compile ----------------------------------------------------------------------------------------------------


@named(*WHOLE)
def test_one_graph_and_no_recompile(name: str) -> None:
    one = run(name)
    assert one.stats.graphs == 1
    assert len(one.programs) == 1
    assert one.frames[0] == one.frames[-1]  # Dynamo traced nothing after the first trajectory
    assert [record.step for record in one.stats.steps] == list(range(STEPS))
    assert len({record.variant for record in one.stats.steps}) == 2


@named(*WHOLE)
def test_timestep_and_latent_are_told_apart_from_the_condition(name: str) -> None:
    one = run(name)
    roles = one.program.analysis.facts.roles
    labels = {known.name: known.label.rpartition("kwargs.")[2] for known in one.program.analysis.facts.inputs}
    found = [labels[role].removeprefix("kwargs_") for role in (roles.timestep, roles.latent)]
    assert [text.replace(".", "_") for text in found] == [one.case.timestep, one.case.latent]


@named(*WHOLE)
def test_every_block_is_found_and_misses_have_their_reasons(name: str, fact: Recorder) -> None:
    one = run(name)
    context = one.program.analysis.facts
    assert shown(context.regions) == list(one.case.regions)
    reasons = [miss.reason for miss in context.rejected]
    assert len(reasons) == len(one.case.rejected), reasons
    for reason, piece in zip(reasons, one.case.rejected, strict=True):
        assert piece in reason
    kinds = Counter(region.kind for region in context.regions)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    fact("models", row_of(name), found=found, **{"left alone": "; ".join(dict.fromkeys(reasons))})


@named(*WHOLE)
def test_every_attention_is_found_with_the_stream_of_its_keys(name: str, fact: Recorder) -> None:
    one = run(name)
    context = one.program.analysis.facts
    kinds = [info.kind + (", fixed" if info.invariant else "") for info in context.attention]
    assert kinds == list(one.case.attention)
    in_regions = {info.node for region in context.regions for info in region.attention}
    depends = dict(context.dependence)
    for info in context.attention:
        assert info.node in in_regions or depends[info.node] in ("condition", "step")
    fact("models", row_of(name), attention="; ".join(dict.fromkeys(kinds)))


@named("HiDreamImage", "NucleusMoEImage")
def test_every_routed_layer_is_found(name: str, fact: Recorder) -> None:
    regions = [region for region in run(name).program.regions if region.kind == "experts"]
    choices = [router.choice for region in regions for router in region.routers]
    assert choices == {"HiDreamImage": ["token"] * 2, "NucleusMoEImage": ["expert"] * 2}[name]
    fact("models", row_of(name), routing=f"{choices[0]} choice")


@named(*WHOLE)
def test_computed_in_full_it_gives_what_eager_gives(name: str) -> None:
    one = run(name)
    regions = one.program.regions
    reference = Reference(one.program.analysis.gm, regions, one.program.schedule)
    full = one.program.schedule.rows[0]
    for args, wanted in zip(one.args, eager(name), strict=True):
        assert distance(reference(full, args), wanted) <= CLOSE


@named(*WHOLE)
def test_a_uniform_schedule_gives_what_the_oracle_says(name: str, fact: Recorder) -> None:
    """Bit for bit, step by step, in each trajectory; and a cached step is not a computed one."""
    one, truth = run(name), eager(name)
    schedule = one.program.schedule
    oracle = Reference(one.program.analysis.gm, one.program.regions, schedule, gathered)
    for step, found in enumerate(zip(*one.outputs, strict=True)):
        wanted = oracle(schedule.rows[schedule.row_index(step) or 0], one.args[step])
        for outputs in found:
            for left, right in zip(wanted, outputs, strict=True):
                assert same(left, right), f"step {step}"
    errors = [distance(found, wanted) for found, wanted in zip(one.outputs[0], truth, strict=True)]
    cached = [row != schedule.rows[0] for row in (schedule.rows[schedule.row_index(s) or 0] for s in range(STEPS))]
    assert [error > CLOSE for error in errors] == cached
    fact("models", row_of(name), cached="equal to the reference, bit for bit")


# -- moeca_compile.compile and explain, torch.export ------------------------------------------------------------------


@named(*WHOLE, fast=("PixArt",))
def test_compiled_by_hand_and_asked_for_a_tuple(name: str) -> None:
    case = ZOO[name]
    torch._dynamo.reset()
    model = moeca.compile(build(name), schedule="full", inner="eager")
    plain = tuple if name != "Kandinsky5" else Tensor  # whose tuple is its one tensor
    with torch.no_grad():
        for step, wanted in enumerate(eager(name, 3)):
            given = model(**{**case.inputs(step), "return_dict": False})
            assert type(given) is plain
            assert distance(tensors(given), wanted) <= CLOSE
    assert moeca.stats(model).graphs == 1
    assert len(moeca.stats(model).steps) == 3


@named(*WHOLE)
def test_export_of_the_prepared_model_takes_other_inputs(name: str, fact: Recorder) -> None:
    case, model = ZOO[name], build(name)
    moeca.prepare(model)
    truth = eager(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own
        exported = torch.export.export(model, (), case.inputs(0), strict=False).module()
        for step in (0, STEPS - 1):  # by then tokens go to other experts
            assert distance(tensors(exported(**case.inputs(step))), truth[step]) <= CLOSE
    fact("models", row_of(name), exported="yes")


# -- other ways to build and call them --------------------------------------------------------------------------------


def matches_eager(model: nn.Module, inputs: Any, close: float, **options: Any) -> Any:
    """Compiled, in full: three steps as eager has them. Returns the statistics."""
    torch._dynamo.reset()
    with torch.no_grad():
        truth = [tensors(model(**inputs(step))) for step in range(3)]
        compiled = torch.compile(model, backend="moeca", options={"inner": "eager", **options})
        for step, wanted in enumerate(truth):
            assert distance(tensors(compiled(**inputs(step))), wanted) <= close
    return moeca.stats(compiled)


@pytest.mark.slow
def test_nucleus_with_grouped_matmuls_in_bfloat16() -> None:
    bfloat16 = torch.bfloat16
    model, inputs = nucleus(use_grouped_mm=True, dtype=bfloat16), partial(nucleus_inputs, dtype=bfloat16)
    stats = matches_eager(model, inputs, 0.0, schedule="full")
    assert stats.graphs == 1


@pytest.mark.slow
def test_a_list_of_images_is_one_trajectory() -> None:
    """Z-Image takes a list of latents: all of them move, and none is taken for the prompt."""
    two = [ZOO["ZImage"].inputs(step) for step in range(4)]
    inputs = [{**one, "x": [one["x"][0], one["x"][0].flip(-1)], "cap_feats": one["cap_feats"] * 2} for one in two]
    model = build("ZImage")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moeca", options={"schedule": "uniform:2", "inner": "eager"})
    with torch.no_grad():
        for one in inputs:
            compiled(**{**one, "t": one["t"].repeat(2)})
    records = moeca.stats(compiled).steps
    assert [record.step for record in records] == [0, 1, 2, 3]
    assert records[0].variant == records[2].variant != records[1].variant == records[3].variant


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if model.in_parts])
def test_a_model_that_must_run_in_parts_says_so_and_is_right(name: str, fact: Recorder) -> None:
    case = ZOO[name]
    torch._dynamo.reset()
    model = torch.compile(build(name), backend="moeca", options={"schedule": "uniform:3", "inner": "eager"})
    with torch.no_grad(), pytest.warns(MoecaWarning) as seen:
        found = [tensors(model(**case.inputs(step))) for step in range(3)]
    assert any("graph break: " in str(one.message) for one in seen)
    for left, right in zip(found, eager(name, 3), strict=True):
        assert distance(left, right) <= CLOSE
    fact("models", row_of(name), cached=f"no: its graph breaks, it runs in parts and says so. {case.in_parts}")


def test_the_report_says_what_an_attention_attends_to() -> None:
    given = ZOO["PixArt"].inputs(0)
    mask = given.pop("encoder_attention_mask")
    names = ("hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs")
    report = moeca.explain(run("PixArt").model, *(given[name] for name in names), None, None, mask)
    assert "cross, fixed keys" in str(report)
    assert str(report).count("  self") == 2
