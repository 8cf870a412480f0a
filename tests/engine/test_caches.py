"""Decoders that denoise over a cache that they write in place: text calls pass, denoising calls are cached.

Two toys, after descriptions: one like HunyuanImage-3 (caches are arguments, mixed experts, image tokens rewritten at
every step), one like SenseNova-U1 (one decoder for prompt and image, with the caches as its own buffers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile as moeca
from moeca_compile.errors import MoecaWarning
from tests.engine.test_timesteps import arguments, equal
from tests.expert_dispatch.test_numbers import Experts
from tests.facts import Recorder
from tests.following import gathered
from tests.passes.test_find_inputs import embedding
from tests.reference import Reference

HEADS, SIZE, PROMPT, IMAGE, STEPS = 2, 4, 3, 5, 7
WIDTH = HEADS * SIZE
LENGTH = PROMPT + IMAGE
Cache = tuple[Tensor, Tensor]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [batch, heads, tokens, size], turned by its positions."""
    angles = positions[:, None] * torch.tensor([1.0, 0.1])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Layer(nn.Module):
    """Attention over a cache, into which the tokens at `positions` are written first; and routed experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.experts = nn.Linear(WIDTH, 4), Experts(WIDTH, 4)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        self.write(keys, values, rotated(k, positions), v, positions)
        attended = F.scaled_dot_product_attention(rotated(q, positions), keys, values, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        tokens = F.layer_norm(x, (WIDTH,)).flatten(0, 1)
        weights, ids = self.router(tokens).softmax(-1).topk(2)
        return x + self.experts(tokens, ids, weights).view_as(x)

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)


class Sliced(Layer):
    """Writes a slice of the cache."""

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        keys[:, :, -k.shape[2] :] = k
        values[:, :, -k.shape[2] :] = v


class Decoder(nn.Module):
    """Like HunyuanImage-3: image tokens, with the timestep as one more addend, over caches that hold the prompt."""

    def __init__(self, layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.into, self.text, self.head = nn.Linear(4, WIDTH), nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.time = nn.Linear(8, WIDTH)

    def run(self, h: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Tensor:
        mask = (torch.arange(LENGTH) <= positions[-1])[None]  # an image sees all of itself
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            h = layer(h, positions, keys, values, mask)
        return self.head(h)  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor | None, t: Tensor | None, positions: Tensor, caches: Sequence[Cache], ids: Tensor | None = None
    ) -> Tensor:
        if ids is not None:
            return self.run(self.text(ids), positions, caches)
        assert x is not None
        assert t is not None
        return self.run(self.into(x) + self.time(embedding(t))[:, None], positions, caches)


class Holding(Decoder):
    """Like SenseNova-U1: the decoder holds its caches."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys_0", "values_0", "keys_1", "values_1"):
            self.register_buffer(name, torch.zeros(2, HEADS, LENGTH, SIZE), persistent=False)

    def forward(self, x: Tensor | None, t: Tensor | None, positions: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        caches = [(self.keys_0, self.values_0), (self.keys_1, self.values_1)]
        return super().forward(x, t, positions, caches, ids)


def fresh_caches(length: int = LENGTH) -> list[Cache]:
    return [(torch.zeros(2, HEADS, length, SIZE), torch.zeros(2, HEADS, length, SIZE)) for _ in range(2)]


class Loop:
    """The calls of one picture: the prompt, then the steps. `call` is the model or what was compiled of it."""

    def __init__(self, call: Any, holds: bool, seed: int = 0) -> None:
        self.call, self.rest = call, () if holds else (fresh_caches(),)
        noise = torch.randn(2, 2, IMAGE, 4, generator=torch.Generator().manual_seed(0))
        self.latents = [noise[0] + 0.1 * step * noise[1] for step in range(STEPS)]
        self.ids = torch.tensor([[1, 2, 3], [4, 5, 6]]) + seed

    def inputs(self, step: int) -> tuple[Any, ...]:
        return self.latents[step], torch.full((2,), 9.0 - step), torch.arange(PROMPT, LENGTH), *self.rest

    def text(self) -> Tensor:
        return self.call(None, None, torch.arange(PROMPT), *self.rest, ids=self.ids)  # type: ignore[no-any-return]

    def run(self) -> list[Tensor]:
        return [self.text(), *(self.call(*self.inputs(step)) for step in range(STEPS))]


def build(holds: bool, layer: type[Layer] = Layer) -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return (Holding() if holds else Decoder(layer)).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


HOLDS = pytest.mark.parametrize(
    "holds",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["caches are arguments", "the model holds them"],
)


@pytest.mark.slow
@HOLDS
def test_computed_in_full_it_is_eager_and_writes_the_caches(holds: bool) -> None:
    model = build(holds)
    eager, loop = Loop(build(holds), holds), Loop(moeca.compile(model, schedule="full", inner="eager"), holds)
    for _ in range(2):
        for left, right in zip(loop.run(), eager.run(), strict=True):
            assert (left - right).abs().max() <= 1e-5
    left_caches, right_caches = (
        [*one.call.buffers()] if holds else [part for pair in one.rest[0] for part in pair] for one in (loop, eager)
    )
    for left, right in zip(left_caches, right_caches, strict=True):
        assert (left - right).abs().max() <= 1e-5


@HOLDS
def test_denoising_is_cached_as_the_oracle_says(holds: bool, fact: Recorder) -> None:
    """The prompt passes uncached; nothing is traced in the second picture."""
    compiled = moeca.compile(build(holds), schedule="uniform:3", inner="eager")
    loop, eager = Loop(compiled, holds), Loop(build(holds), holds)
    torch._dynamo.utils.counters.clear()
    outputs, traced = [], []
    for _ in range(2):
        outputs.append(loop.run())
        traced.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert traced[0] == traced[1]
    assert not moeca.stats(compiled).warnings
    steps = [record for record in moeca.stats(compiled).steps if record.timestep is not None]
    assert [record.variant for record in steps] == ["v0", "v1", "v1"] * 2 + ["v0"]
    assert (outputs[0][0] - eager.text()).abs().max() <= 1e-5
    program, args = arguments(compiled, [loop.inputs(0)])
    assert {region.kind for region in program.regions} == {"attention", "experts"}
    assert len(program.caches) == 4
    for trajectory in outputs:
        oracle = Reference(program.analysis.gm, program.regions, program.schedule, gathered)
        loop.text()
        for step, found in enumerate(trajectory[1:]):
            row = program.schedule.rows[program.schedule.row_index(step) or 0]
            args = arguments(compiled, [loop.inputs(step)])[1]
            assert equal(oracle(row, args[0])[:1], [found]), f"step {step}"
    kinds = Counter(region.kind for region in program.regions)
    name = "a decoder that holds its caches (SenseNova-U1)" if holds else "a decoder over given caches (HunyuanImage-3)"
    fact(
        "models", f"Toy of {name}", found=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        cached="equal to the reference, bit for bit; calls of text pass uncached",
    )  # fmt: skip


@pytest.fixture(scope="module")
def given_caches() -> Any:
    """For tests beside each other: building another model makes Dynamo forget this one."""
    return moeca.compile(build(False), schedule="uniform:3", inner="eager")


@pytest.mark.slow
def test_a_skipped_step_leaves_the_caches_as_they_are(given_caches: Any) -> None:
    compiled = given_caches
    loop = Loop(compiled, False)
    loop.text()
    written = []
    for step in range(4):
        compiled(*loop.inputs(step))
        written.append(loop.rest[0][0][0].clone())
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    assert not torch.equal(written[0], written[3])


@pytest.mark.slow
def test_guidance_streams_are_told_apart_by_their_caches(given_caches: Any) -> None:
    compiled = given_caches
    moeca.reset(compiled)
    loops = [Loop(compiled, False), Loop(compiled, False, seed=1)]
    for loop in loops:
        loop.text()
    outputs = [[compiled(*loop.inputs(step)) for loop in loops] for step in range(STEPS)]
    for number in range(2):
        moeca.reset(compiled)
        truth = Loop(compiled, False, seed=number).run()[1:]
        for left, right in zip([pair[number] for pair in outputs], truth, strict=True):
            assert torch.equal(left, right)


def test_a_slice_is_written_like_an_index() -> None:
    compiled = moeca.compile(build(False, Sliced), schedule="uniform:3", inner="eager")
    loop = Loop(compiled, False)
    for step in range(STEPS):
        compiled(*loop.inputs(step))
    steps = moeca.stats(compiled).steps
    assert [record.variant for record in steps] == ["v0", "v1", "v1"] * 2 + ["v0"]


class Counting(Layer):
    """Adds to the cache, so that a call that is left out is missing."""

    def write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        keys.index_add_(2, positions, k)
        values[:, :, PROMPT:] = 0.5 * values[:, :, PROMPT:] + v[:, :, -IMAGE:]


def test_a_cache_that_is_added_to_runs_uncached_and_right() -> None:
    model = build(False, Counting)
    loop, eager = (
        Loop(moeca.compile(model, schedule="uniform:3", inner="eager"), False),
        Loop(build(False, Counting), False),
    )
    with pytest.warns(MoecaWarning, match=r"in place while it runs.*if what is written isn't computed from it"):
        found = [loop.call(*loop.inputs(step)) for step in range(STEPS)]
    for left, right in zip(found, [eager.call(*eager.inputs(step)) for step in range(STEPS)], strict=True):
        assert (left - right).abs().max() <= 1e-5


@pytest.mark.slow
def test_a_cache_shorter_than_the_sequence_is_the_models_own_error() -> None:
    """And the next call, with a cache that is long enough, is right."""
    compiled = moeca.compile(build(False), schedule="uniform:3", inner="eager")
    loop, eager = Loop(compiled, False), Loop(build(False), False)
    for call in (compiled, eager.call):
        with pytest.raises(Exception, match=r"(?i)index|size|shape|range"):
            call(*loop.inputs(0)[:3], fresh_caches(LENGTH - 1))
    for left, right in zip(loop.run()[:2], eager.run()[:2], strict=True):
        assert (left - right).abs().max() <= 1e-5
