"""The numpy samplers against closed forms and against the same steps written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from examples.samplers import euler, guided, model_of
from moeca_compile.errors import BundleError
from moeca_compile.runtime.session import Session

NOISE = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
LABELS, NULL = np.array([1, 2]), np.array([10, 10])


def test_euler_of_a_straight_flow_is_exact() -> None:
    """From noise to data along noise - data: one step is as good as many."""
    data = np.ones_like(NOISE)
    for steps in (1, 7):
        end = euler(lambda x, t, y: NOISE - data, NOISE, LABELS, np.linspace(1, 0, steps + 1))
        np.testing.assert_allclose(end, data, atol=1e-5)
        assert end.dtype == np.float32


def test_euler_scales_times_and_takes_channels() -> None:
    seen = []

    def model(x: Any, t: float, y: Any) -> Any:
        seen.append(t)
        return np.concatenate([x, np.full_like(x, 1e9)], axis=1)

    end = euler(model, NOISE, LABELS, (1.0, 0.5, 0.0), time_scale=1000, channels=4)
    assert seen == [1000, 500]
    np.testing.assert_allclose(end, NOISE * 0.25, rtol=1e-6)


def test_guidance_in_one_call_and_in_two() -> None:
    def model(x: Any, t: float, y: Any) -> Any:
        return x * y.reshape(-1, 1, 1, 1).astype(x.dtype)

    wanted = NOISE * (10 + 3 * (LABELS - 10)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(guided(model, NULL, 3.0)(NOISE, 0.0, LABELS), wanted, rtol=1e-5)
    np.testing.assert_allclose(guided(model, NULL, 3.0, model)(NOISE, 0.0, LABELS), wanted, rtol=1e-5)


def test_guidance_in_two_streams_equals_one_batch(session: Session) -> None:
    """Two trajectories with a cache each, or one with both halves in its batch: tokens of samples don't mix."""
    times = np.linspace(1, 0, 7)
    with session.trajectory() as both:
        one = euler(guided(model_of(both), NULL, 2.0), NOISE, LABELS, times, 1000)
    with session.trajectory(stream="cond") as cond, session.trajectory(stream="uncond") as uncond:
        two = euler(guided(model_of(cond), NULL, 2.0, model_of(uncond)), NOISE, LABELS, times, 1000)
        assert len(cond.records) == len(uncond.records) == 6
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_a_model_of_a_trajectory_names_its_inputs(session: Session) -> None:
    with session.trajectory() as trajectory:
        with pytest.raises(BundleError, match=r"nothing named \['time'\]"):
            model_of(trajectory, t="time")
        assert model_of(trajectory)(NOISE, 1.0, LABELS).shape == NOISE.shape
