"""Means, intervals and worst shares against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.paired import interval, paired, psnr, worst


def test_psnr_is_of_each_sample() -> None:
    truth = torch.zeros(3, 1, 2, 2)
    samples = torch.stack([torch.full((1, 2, 2), error) for error in (0.02, 0.2, 0.0)])
    assert psnr(samples, truth) == pytest.approx([40.0, 20.0, 150.0], abs=1e-5)
    assert psnr(samples, truth, data_range=1.0)[0] == pytest.approx(40.0 - 20 * math.log10(2))


def test_an_interval_is_the_mean_and_its_standard_error_twice() -> None:
    """1, 2, 3, 4: the sample's variance is 5/3."""
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, half) == pytest.approx((2.5, 1.959964 * math.sqrt(5 / 3 / 4)))


def test_pairing_takes_out_what_both_share() -> None:
    """The samples differ by 30 dB from each other, the contenders by 1 or 2 dB at each."""
    mean, half = paired([11.0, 22.0, 31.0, 42.0], [10.0, 20.0, 30.0, 40.0])
    assert (mean, half) == pytest.approx((1.5, 1.959964 * math.sqrt(1 / 3 / 4)))
    assert half < interval([11.0, 22.0, 31.0, 42.0])[1] / 10


def test_samples_that_have_no_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_the_worst_share_is_one_sample_at_least() -> None:
    assert worst([5.0, 1.0, 3.0]) == 1.0
    assert worst([float(value) for value in range(40)], share=0.05) == 0.5
