"""The Frechet distance: of normal distributions whose distance is known, of too few samples, and what judges see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples import digits
from examples.frechet import features_of, frechet


def with_moments(mean: Tensor, covariance: Tensor) -> Tensor:
    """Features that have exactly this mean and covariance."""
    n, dims = 400, len(mean)
    drawn = torch.randn(n, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.qr(drawn - drawn.mean(0)).Q * (n - 1) ** 0.5
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_of_independent_features_it_is_the_distance_of_means_and_deviations() -> None:
    a = with_moments(torch.tensor([0.0, 1.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    b = with_moments(torch.tensor([3.0, 1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double())
    assert frechet(a, b) == pytest.approx(9 + 0 + 4 + 1 + 0 + 4)


def test_of_features_that_hang_together() -> None:
    """C1 = I: the trace of the root is that of C2's, here of eigenvalues 9 and 1."""
    zero = torch.zeros(2).double()
    mixed = with_moments(zero, torch.tensor([[5.0, 4.0], [4.0, 5.0]]).double())
    assert frechet(with_moments(zero, torch.eye(2).double()), mixed) == pytest.approx(2 + 10 - 2 * (3 + 1))


def test_covariances_that_do_not_commute_are_treated_alike() -> None:
    a = with_moments(torch.zeros(2).double(), torch.tensor([[5.0, 4.0], [4.0, 5.0]]).double())
    b = with_moments(torch.zeros(2).double(), torch.tensor([[1.0, 0.0], [0.0, 16.0]]).double())
    # the root of the product has trace sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2)))
    assert frechet(a, b) == pytest.approx(10 + 17 - 2 * (5 + 80 + 2 * (9 * 16) ** 0.5) ** 0.5)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_it_stays_exact_where_covariances_lack_rank() -> None:
    """Fewer samples than features, and a feature that is always zero: to itself zero, shifted the shift."""
    few = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few[:, 3] = 0
    assert frechet(few, few) == pytest.approx(0, abs=1e-12)
    assert frechet(few, few + 0.5) == pytest.approx(12 * 0.25)


def test_a_judge_is_asked_in_parts_and_averages_over_places() -> None:
    judge = digits.load_classifier()
    images = digits.initial_noise(0, 1030)
    found = features_of(judge, images)
    assert (found.shape, found.dtype) == ((1030, 64), torch.float64)
    with torch.no_grad():
        places = judge.features(images[1029:])
        torch.testing.assert_close(found[1029], places.mean((2, 3))[0].double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(judge(images[:3]), judge.head(judge.features(images[:3]).flatten(1)))
