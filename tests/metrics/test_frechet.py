import numpy as np
import pytest
import torch

from tread_composer.metrics.frechet import frechet_distance, statistics


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(*(statistics(torch.as_tensor(side)) for side in (a, b)))


def second_implementation(a: np.ndarray, b: np.ndarray) -> float:
    """tr((A^1/2 B A^1/2)^1/2) from symmetric eigenvalues, where the library takes the eigenvalues of A B."""
    mean_a, mean_b, a, b = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def test_agrees_with_a_second_implementation_on_correlated_features():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    b = rng.standard_normal((700, 12)) @ rng.standard_normal((12, 12)) + 0.3
    assert distance(a, b) == pytest.approx(second_implementation(a, b), rel=1e-6)


def test_equal_sets_have_no_distance_and_half_precision_is_computed_in_float64():
    x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    assert distance(x, x) == pytest.approx(0.0, abs=1e-8)
    assert distance(x.half(), x) == distance(x.half().double(), x)
