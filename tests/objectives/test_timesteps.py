"""Time distributions: the quantile function and the density must describe the same distribution."""

import math

import pytest
import torch

from tread_composer.core.protocols import TimeDistribution
from tread_composer.objectives import CosMap, LogitNormal, Mode, Shifted, Uniform
from tread_composer.objectives.timesteps import shift_times

DISTRIBUTIONS = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-0.5, 1.0),
    LogitNormal(0.51, 1.2),
    LogitNormal(0.0, 0.4),
    LogitNormal(-1.2, 1.2),  # EDM's noise levels
    Mode(),
    Mode(1.0),
    Mode(0.0),
    Mode(-0.6),
    CosMap(),
    Shifted(Uniform(), 3.0),
    Shifted(LogitNormal(0.3, 0.8), 0.3),
    Shifted(Mode(0.8), 1 / 0.3),
]
EVERY = pytest.mark.parametrize('distribution', DISTRIBUTIONS, ids=repr)


@EVERY
def test_density_is_the_slope_of_the_inverse_quantile(distribution: TimeDistribution) -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    step = 1e-6
    slope = (distribution.quantile(u + step) - distribution.quantile(u - step)) / (2 * step)
    assert (slope > 0).all()
    torch.testing.assert_close(distribution.density(distribution.quantile(u)), 1 / slope, rtol=1e-6, atol=0)


def test_logit_normal_has_its_mean_and_std_on_the_logit_scale() -> None:
    t = LogitNormal(mean=-0.7, std=1.3).quantile(torch.tensor([0.5, 0.8413447], dtype=torch.float64))
    torch.testing.assert_close(torch.logit(t), torch.tensor([-0.7, 0.6], dtype=torch.float64), rtol=0, atol=1e-6)
    assert LogitNormal(mean=1.0).quantile(torch.tensor(0.5)) > 0.7  # a positive mean is on the noise side


@pytest.mark.parametrize('scale', [-1.0, -0.4, 0.0, 1.29, 1.75])
def test_mode_draws_the_published_function_of_uniform_numbers(scale: float) -> None:
    for u in (0.0, 0.01, 0.3, 0.5, 0.8, 1.0):
        published = 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        found = Mode(scale).quantile(torch.tensor(1 - u, dtype=torch.float64))
        assert found == pytest.approx(published, abs=1e-12)


def test_cosmap_draws_the_published_function() -> None:
    for u in (0.001, 0.3, 0.5, 0.8, 0.999):
        published = 1 - 1 / (math.tan(math.pi / 2 * u) + 1)
        assert CosMap().quantile(torch.tensor(u, dtype=torch.float64)) == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize('shift', [0.3, 1.0, 2.0])
def test_shift_multiplies_the_odds_and_keeps_the_ends(shift: float) -> None:
    for t in (0.1, 0.5, 0.9):
        moved = float(shift_times(torch.tensor(t, dtype=torch.float64), shift))
        assert moved / (1 - moved) == pytest.approx(shift * t / (1 - t))
        # SD3's eq. 23 with sqrt(m / n) = shift.
        assert moved == pytest.approx(shift * t / (1 + (shift - 1) * t))
    assert shift_times(torch.tensor([0.0, 1.0]), shift).tolist() == [0.0, 1.0]


def test_a_shifted_logit_normal_is_a_logit_normal() -> None:
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted, plain = Shifted(LogitNormal(0.2, 0.7), 3.0), LogitNormal(0.2 + math.log(3.0), 0.7)
    torch.testing.assert_close(shifted.quantile(u), plain.quantile(u))
    torch.testing.assert_close(shifted.density(u), plain.density(u))


@EVERY
def test_density_outside_is_zero_and_never_nan(distribution: TimeDistribution) -> None:
    assert torch.equal(distribution.density(torch.tensor([-0.5, -0.1, 1.1, 2.0])), torch.zeros(4))
    assert distribution.density(torch.tensor([0.0, 1.0])).isfinite().all()


@EVERY
def test_extreme_quantiles_give_times_in_order_between_0_and_1(distribution: TimeDistribution) -> None:
    t = distribution.quantile(torch.tensor([2.0**-25, 0.3, 1 - 2.0**-24]))
    assert t.dtype == torch.float32
    assert 0 < t[0] < t[1] < t[2] <= 1
