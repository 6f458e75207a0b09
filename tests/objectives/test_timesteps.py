"""Time distributions: the quantile function and the density must describe the same distribution."""

import math

import pytest
import torch

from tread_composer.objectives import LogitNormal, Uniform

DISTRIBUTIONS = [Uniform(), LogitNormal(), LogitNormal(-0.5, 1.0), LogitNormal(0.51, 1.2), LogitNormal(0.0, 0.4)]


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_density_is_the_slope_of_the_inverse_quantile(distribution: Uniform | LogitNormal) -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    step = 1e-6
    slope = (distribution.quantile(u + step) - distribution.quantile(u - step)) / (2 * step)
    torch.testing.assert_close(distribution.density(distribution.quantile(u)), 1 / slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_histogram_of_drawn_times_is_the_density(distribution: Uniform | LogitNormal) -> None:
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    histogram = torch.histc(distribution.quantile(u), bins=20, min=0.0, max=1.0) / len(u)
    fine = torch.arange(20_000, dtype=torch.float64) / 20_000 + 0.5 / 20_000
    expected = distribution.density(fine).reshape(20, -1).mean(dim=1) / 20
    torch.testing.assert_close(histogram.double(), expected, rtol=0, atol=0.003)
    assert expected.sum() == pytest.approx(1, abs=1e-4)


def test_logit_normal_has_its_mean_and_std_on_the_logit_scale() -> None:
    t = LogitNormal(mean=-0.7, std=1.3).quantile(torch.tensor([0.5, 0.8413447], dtype=torch.float64))
    torch.testing.assert_close(torch.logit(t), torch.tensor([-0.7, 0.6], dtype=torch.float64), rtol=0, atol=1e-6)
    assert LogitNormal(mean=1.0).quantile(torch.tensor(0.5)) > 0.7  # a positive mean is on the noise side


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_density_outside_is_zero_and_never_nan(distribution: Uniform | LogitNormal) -> None:
    assert torch.equal(distribution.density(torch.tensor([-0.1, 1.1])), torch.zeros(2))
    assert distribution.density(torch.tensor([0.0, 1.0])).isfinite().all()


def test_extreme_quantiles_give_finite_times() -> None:
    u = torch.tensor([2.0**-25, 1 - 2.0**-24])
    t = LogitNormal().quantile(u)
    assert t.dtype == torch.float32
    assert 0 < t[0] < t[1] < 1


@pytest.mark.parametrize(('mean', 'std'), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_settings_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match='LogitNormal wants'):
        LogitNormal(mean, std)
