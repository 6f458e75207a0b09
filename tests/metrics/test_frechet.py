import numpy as np
import pytest
import torch

from tread_composer.metrics.frechet import frechet_distance


def second_implementation(a: np.ndarray, b: np.ndarray) -> float:
    """tr((A^1/2 B A^1/2)^1/2) from symmetric eigenvalues, where the library takes the eigenvalues of A B."""
    mean_a, mean_b, a, b = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def whitened(deviations: list[float], mean: list[float], count: int = 200) -> np.ndarray:
    """Samples whose covariance is exactly diagonal with these deviations."""
    x = np.random.default_rng(0).standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * deviations + mean


def test_diagonal_gaussians_by_hand():
    a, b = whitened([1.0, 2.0, 0.5], [0.0, 1.0, 2.0]), whitened([3.0, 2.0, 1.5], [1.0, 1.0, 0.0], count=333)
    assert frechet_distance(a, b) == pytest.approx((1 + 4) + (4 + 0 + 1), rel=1e-9)


def test_agrees_with_a_second_implementation_on_correlated_features():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    b = rng.standard_normal((700, 12)) @ rng.standard_normal((12, 12)) + 0.3
    assert frechet_distance(a, b) == pytest.approx(second_implementation(a, b), rel=1e-6)


def test_equal_sets_have_no_distance_and_half_precision_is_computed_in_float64():
    x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-8)
    half = x.half()
    assert frechet_distance(half, x) == frechet_distance(half.double(), x)


def test_what_cannot_be_measured_is_refused():
    good = torch.randn(10, 4)
    with pytest.raises(ValueError, match='not finite'):
        frechet_distance(good * float('nan'), good)
    with pytest.raises(ValueError, match='4 and 3 dimensions'):
        frechet_distance(good, good[:, :3])
    with pytest.raises(ValueError, match='at least 2 x 2'):
        frechet_distance(good, good[0])
