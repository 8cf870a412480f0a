"""Skip-DiT and Skip-Cache are what their description says; a span of moeca equals the hand-written loop bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moeca_compile as moeca
from examples import digits, skip_dit
from examples.dit_moe import randomize_
from examples.skip_dit import SkipCache, SkipDiT, SkipMerge, skip_cache_sample
from moeca_compile.errors import CaptureError
from moeca_compile.schedule import Action, Schedule

C, R = (Action.COMPUTE,), (Action.REUSE,)
EAGER = {"inner": "eager", "order": 0}
SKIPS = pytest.mark.parametrize("skips", [True, False])
TRAINED = {"skip": (True, skip_dit.SKIP_FILE), "plain": (False, skip_dit.PLAIN_FILE)}


def tiny(depth: int = 6, skips: bool = True) -> SkipDiT:
    model = SkipDiT(depth, 32, 2, input_size=digits.SIZE, in_channels=1, num_classes=digits.CLASSES, skips=skips)
    return randomize_(model, seed=1).eval().requires_grad_(False)


def inputs(t: float = 700.0, n: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return digits.initial_noise(seed, n), torch.full((n,), t), digits.labels_of(n)


@contextmanager
def watched(model: SkipDiT) -> Iterator[list[tuple[int, Tensor]]]:
    """The blocks that run, in order, each with its output."""
    seen: list[tuple[int, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda *call, i=i: seen.append((i, call[-1])))
        for i, block in enumerate(model.blocks)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("depth", [2, 6])
def test_each_block_of_the_second_half_merges_its_mirror_image(depth: int) -> None:
    model = tiny(depth)
    x, c = model.embed(*inputs())
    outputs: list[Tensor] = []
    for i, block in enumerate(model.blocks):
        if i >= depth // 2:
            merge, both = model.merges[i - depth // 2], torch.cat([x, outputs[depth - 1 - i]], dim=-1)
            mean, variance = both.mean(-1, keepdim=True), both.var(-1, keepdim=True, unbiased=False)
            normed = (both - mean) / (variance + 1e-5).sqrt() * merge.norm.weight + merge.norm.bias
            x = normed @ merge.linear.weight.T + merge.linear.bias
        x = block(x, c)
        outputs.append(x)
    torch.testing.assert_close(model(*inputs()), model.finish(x, c), rtol=1e-4, atol=1e-4)


def test_without_skips_blocks_follow_one_another() -> None:
    model = tiny(skips=False)
    x, c = model.embed(*inputs())
    for block in model.blocks:
        x = block(x, c)
    assert torch.equal(model(*inputs()), model.finish(x, c))
    assert not len(model.merges)


def test_both_share_every_other_parameter() -> None:
    with_, without = (tiny(skips=skips).state_dict() for skips in (True, False))
    assert {name for name in with_ if not name.startswith("merges.")} == set(without)


def test_merge_norms_in_float32() -> None:
    """A feature of 300 beside one of 1: bfloat16 sums would not give these means and variances."""
    merge = randomize_(SkipMerge(64), seed=3).bfloat16()
    x, skip = torch.randn(2, 4, 64).add(300).bfloat16(), torch.randn(2, 4, 64).bfloat16()
    exact = merge.float()
    both = torch.nn.functional.layer_norm(torch.cat([x, skip], -1).float(), (128,), exact.norm.weight, exact.norm.bias)
    expected = torch.nn.functional.linear(both.bfloat16().float(), exact.linear.weight, exact.linear.bias).bfloat16()
    with torch.no_grad():
        found = merge.bfloat16()(x, skip)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("depth", [0, 5])
def test_an_odd_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth {depth}: each block of the first half needs its partner"):
        SkipDiT(depth)


@SKIPS
def test_training_reaches_every_parameter(skips: bool) -> None:
    model = tiny(skips=skips).train().requires_grad_(True)
    model(*inputs()).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@SKIPS
def test_interval_one_is_the_model_itself(skips: bool) -> None:
    model = tiny(skips=skips)
    made = skip_cache_sample(model, kept=1, interval=1, seed=0, n=2, steps=4)
    assert torch.equal(made, digits.sample(model, seed=0, n=2, steps=4))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_reuse_step_runs_the_outer_blocks_only(kept: int) -> None:
    model = tiny()
    loop = SkipCache(model, kept, interval=3)
    with watched(model) as seen:
        ran = []
        for t in (900.0, 800.0, 700.0, 600.0):
            loop(*inputs(t))
            ran.append([i for i, _ in seen])
            seen.clear()
    outer = [*range(kept), *range(6 - kept, 6)]
    assert ran == [list(range(6)), outer, outer, list(range(6))]


@pytest.mark.parametrize("kept", [1, 2])
def test_a_reuse_step_takes_old_features_and_fresh_skips(kept: int) -> None:
    """The same by hand: x entering block L-s from the first call, all else from the second."""
    model = tiny()
    loop = SkipCache(model, kept, interval=2)
    with watched(model) as first:
        loop(*inputs(900.0))
    with watched(model) as second:
        model(*inputs(850.0, seed=3))
    _, c = model.embed(*inputs(850.0, seed=3))
    x = dict(first)[5 - kept]
    for i in range(6 - kept, 6):
        x = model.blocks[i](model.merges[i - 3](x, dict(second)[5 - i]), c)
    assert torch.equal(loop(*inputs(850.0, seed=3)), model.finish(x, c))


@SKIPS
def test_only_a_long_skip_lets_the_image_into_a_reuse_step(skips: bool) -> None:
    """What the skips are for: without them the same reuse step never sees its input."""
    loops = [SkipCache(tiny(skips=skips), kept=1, interval=2) for _ in range(2)]
    for loop in loops:
        loop(*inputs(900.0))
    found = [loop(*inputs(850.0, seed=seed)) for seed, loop in enumerate(loops)]
    assert torch.equal(*found) is not skips


def test_steps_outside_the_window_run_everything_and_the_first_inside_refreshes() -> None:
    model = tiny()
    loop = SkipCache(model, kept=1, interval=2, window=(200.0, 800.0))
    with watched(model) as seen:
        counts = []
        for t in (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0):
            loop(*inputs(t))
            counts.append(len(seen))
            seen.clear()
    assert counts == [6, 6, 6, 2, 6, 2, 6, 6, 6]


@pytest.mark.parametrize("kept", [0, 3])
def test_kept_blocks_must_leave_some_to_skip(kept: int) -> None:
    with pytest.raises(ValueError, match=f"kept={kept}: with 6 blocks, 1 to 2 can be"):
        SkipCache(tiny(), kept, interval=2)


# -- moeca's span against the hand-written loop -----------------------------------------------------------------------


def windowed(steps: int, interval: int, window: tuple[float, float]) -> Schedule:
    """The rows of Skip-Cache's window, from the timesteps of `digits.sample`."""
    inside = [window[0] < 1000 * (1 - step / steps) < window[1] for step in range(steps)]
    start = inside.index(True)
    return Schedule(tuple(R if here and (step - start) % interval else C for step, here in enumerate(inside)), order=0)


@pytest.mark.parametrize(("kept", "interval"), [(2, 3), pytest.param(1, 5, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_skip_span_is_skip_cache(kept: int, interval: int) -> None:
    model = tiny()
    cached = moeca.compile(model, schedule=f"uniform:{interval}", granularity=f"skip:{kept}", **EAGER)
    made = digits.sample(cached, seed=0, n=2, steps=8)
    assert torch.equal(made, skip_cache_sample(model, kept, interval, seed=0, n=2, steps=8))
    assert not torch.equal(made, digits.sample(model, seed=0, n=2, steps=8))
    assert moeca.stats(cached).graphs == 1


@pytest.mark.parametrize(
    ("kept", "interval", "window"),
    [(1, 2, (200.0, 800.0)), pytest.param(2, 3, (0.0, 650.0), marks=pytest.mark.slow)],
)
def test_skip_span_with_a_window(kept: int, interval: int, window: tuple[float, float]) -> None:
    model, schedule = tiny(), windowed(10, interval, window)
    cached = moeca.compile(model, schedule=schedule, granularity=f"skip:{kept}", **EAGER)
    made = digits.sample(cached, seed=0, n=2, steps=10)
    assert torch.equal(made, skip_cache_sample(model, kept, interval, window, seed=0, n=2, steps=10))
    assert [record.variant for record in moeca.stats(cached).steps].count("v1") == schedule.rows.count(R) > 0


class ChangeCache(SkipCache):
    """Keeps the change between the same two ends instead, and adds it to what enters the span now."""

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model, depth, skips = self.model, len(self.model.blocks), []
        x, c = model.embed(x, t, y)
        entering = model.run(x, c, skips, 0, self.kept)
        if self.cache is not None and self.age < self.interval:
            x, self.age = entering + self.cache, self.age + 1
        else:
            x = model.run(entering, c, skips, self.kept, depth - self.kept)
            self.cache, self.age = x - entering, 1
        return model.finish(model.run(x, c, skips, depth - self.kept, depth), c)


@pytest.mark.slow
@SKIPS
def test_slice_of_the_blocks_keeps_the_change_between_the_same_ends(skips: bool) -> None:
    """What a plain DiT needs in place of long skips, and what one with them can do too."""
    model = tiny(skips=skips)
    cached = moeca.compile(model, schedule="uniform:3", granularity="blocks:1:-1", **EAGER)
    made = digits.sample(cached, seed=0, n=2, steps=8)
    assert torch.equal(made, digits.sample(ChangeCache(model, kept=1, interval=3), seed=0, n=2, steps=8))


@pytest.mark.slow
def test_executed_macs_are_those_of_the_loop() -> None:
    model = tiny()
    cached = moeca.compile(model, schedule="uniform:3", granularity="skip:2", **EAGER)
    digits.sample(cached, seed=0, n=1, steps=3)
    loop = SkipCache(model, kept=2, interval=3)
    spent = []
    for t in (900.0, 800.0, 700.0):
        # Fused attention has no entry in the counter on a CPU; its plain form is two matrix products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loop(*inputs(t))
        spent.append(counter.get_total_flops())
    assert moeca.stats(cached).mac_fraction == pytest.approx(sum(spent) / (3 * spent[0]), rel=1e-9)


@pytest.mark.slow
def test_one_span_is_all_there_is_to_schedule() -> None:
    """Its tensor is all of the state, and the outer blocks are none of its body."""
    model = tiny()
    report = moeca.explain(model, *inputs(), schedule="uniform:2", granularity="skip:2", **EAGER)
    (span,) = report.regions
    assert span.kind == "span"
    assert span.shapes == ((2, 64, 32),)
    assert {name.split(".")[1] for name, _ in span.parameters if name.startswith("blocks.")} == {"2", "3"}
    assert report.state_bytes == 2 * 64 * 32 * 4


@pytest.mark.slow
def test_a_model_without_skips_says_so() -> None:
    with pytest.raises(CaptureError, match=r"no long skip .* keeps 1 outer blocks: this model has none"):
        moeca.explain(tiny(skips=False), *inputs(), granularity="skip:1", **EAGER)


@pytest.mark.slow
def test_compiled_skip_span() -> None:
    model = tiny()
    cached = moeca.compile(model, schedule="uniform:3", order=0, granularity="skip:1")
    made = digits.sample(cached, seed=0, n=2, steps=8)
    torch.testing.assert_close(made, skip_cache_sample(model, 1, 3, seed=0, n=2, steps=8), rtol=0, atol=1e-5)


# -- the committed checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoints_are_small(name: str) -> None:
    _, path = TRAINED[name]
    assert path.stat().st_size < 2.5e6
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize(("n", "steps"), [(10, 20), pytest.param(100, 50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.slow
def test_samples_show_their_class(name: str, n: int, steps: int) -> None:
    images = digits.sample(skip_dit.load_digits(TRAINED[name][0]), seed=1, n=n, steps=steps)
    assert digits.accuracy(images, digits.labels_of(n)) >= 0.9


@pytest.mark.slow
def test_trained_model_under_skip_cache() -> None:
    """The whole way on trained weights, guidance included: the same digits bit by bit, and near the uncached ones."""
    model = skip_dit.load_digits(skips=True)
    sampling: dict[str, Any] = {"seed": 0, "n": 2, "steps": 20}
    cached = moeca.compile(model, schedule="uniform:2", granularity="skip:1", **EAGER)
    made = digits.sample(cached, **sampling)
    assert torch.equal(made, skip_cache_sample(model, kept=1, interval=2, **sampling))
    assert digits.psnr(made, digits.sample(model, **sampling)).mean() > 15
