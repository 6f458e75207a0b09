"""Time distributions: the quantile function and the density must describe the same distribution."""

import math

import pytest
import torch

from tread_composer.core.protocols import TimeDistribution
from tread_composer.objectives import CosMap, DiscreteUniform, LogitNormal, Mode, Shifted, Uniform
from tread_composer.objectives.timesteps import shift_times

CONTINUOUS = [
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
EVERY = [*CONTINUOUS, DiscreteUniform(), DiscreteUniform(250)]


@pytest.mark.parametrize('distribution', CONTINUOUS, ids=repr)
def test_density_is_the_slope_of_the_inverse_quantile(distribution: TimeDistribution) -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    step = 1e-6
    slope = (distribution.quantile(u + step) - distribution.quantile(u - step)) / (2 * step)
    assert (slope > 0).all()
    torch.testing.assert_close(distribution.density(distribution.quantile(u)), 1 / slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize('distribution', EVERY, ids=repr)
def test_histogram_of_drawn_times_is_the_density(distribution: TimeDistribution) -> None:
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    histogram = torch.histc(distribution.quantile(u), bins=20, min=0.0, max=1.0) / len(u)
    fine = torch.arange(20_000, dtype=torch.float64) / 20_000 + 0.5 / 20_000
    expected = distribution.density(fine).reshape(20, -1).mean(dim=1) / 20
    # A step that lies on the edge of a bin counts for the bin above.
    edge = 1 / distribution.num_steps if isinstance(distribution, DiscreteUniform) else 0.0
    torch.testing.assert_close(histogram.double(), expected, rtol=0, atol=0.003 + edge)
    assert expected.sum() == pytest.approx(1, abs=1e-4)


def test_logit_normal_has_its_mean_and_std_on_the_logit_scale() -> None:
    t = LogitNormal(mean=-0.7, std=1.3).quantile(torch.tensor([0.5, 0.8413447], dtype=torch.float64))
    torch.testing.assert_close(torch.logit(t), torch.tensor([-0.7, 0.6], dtype=torch.float64), rtol=0, atol=1e-6)
    assert LogitNormal(mean=1.0).quantile(torch.tensor(0.5)) > 0.7  # a positive mean is on the noise side


def test_edm_noise_levels_are_a_logit_normal_on_the_straight_path() -> None:
    u = torch.tensor([0.1, 0.5, 0.8413447], dtype=torch.float64)
    t = LogitNormal(mean=-1.2, std=1.2).quantile(u)
    sigma = torch.exp(-1.2 + 1.2 * torch.special.ndtri(u))
    torch.testing.assert_close(t / (1 - t), sigma)


@pytest.mark.parametrize('scale', [-1.0, -0.4, 0.0, 1.29, 1.75])
def test_mode_draws_the_published_function_of_uniform_numbers(scale: float) -> None:
    for u in (0.0, 0.01, 0.3, 0.5, 0.8, 1.0):
        published = 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        found = Mode(scale).quantile(torch.tensor(1 - u, dtype=torch.float64))
        assert found == pytest.approx(published, abs=1e-12)


def test_mode_trains_more_on_the_middle_the_larger_its_scale() -> None:
    middle = torch.tensor([0.5, 0.02], dtype=torch.float64)
    densities = [Mode(scale).density(middle).tolist() for scale in (-0.8, 0.0, 0.8, 1.5)]
    assert [row[0] for row in densities] == sorted(row[0] for row in densities)
    assert [row[1] for row in densities] == sorted((row[1] for row in densities), reverse=True)
    assert Mode(0.0).density(middle).tolist() == pytest.approx([1.0, 1.0])
    assert Mode(1.29).density(middle)[0] == pytest.approx(1 / (2.29 - 1.29 * math.pi / 2))


def test_cosmap_draws_the_published_function() -> None:
    for u in (0.001, 0.3, 0.5, 0.8, 0.999):
        published = 1 - 1 / (math.tan(math.pi / 2 * u) + 1)
        assert CosMap().quantile(torch.tensor(u, dtype=torch.float64)) == pytest.approx(published, abs=1e-12)


def test_discrete_steps_are_equally_likely_and_none_is_the_data() -> None:
    steps = DiscreteUniform(1000)
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    assert torch.bincount(steps.step(u)).tolist() == [5] * 1000
    t = steps.quantile(torch.tensor([2.0**-25, 0.5, 1 - 2.0**-24]))
    assert t.tolist() == pytest.approx([0.001, 0.501, 1.0]) and t.dtype == torch.float32
    assert steps.step(torch.tensor([2.0**-25, 1 - 2.0**-24])).tolist() == [0, 999]


@pytest.mark.parametrize('shift', [0.3, 1.0, 2.0])
def test_shift_multiplies_the_odds_and_keeps_the_ends(shift: float) -> None:
    for t in (0.1, 0.5, 0.9):
        moved = float(shift_times(torch.tensor(t, dtype=torch.float64), shift))
        assert moved / (1 - moved) == pytest.approx(shift * t / (1 - t))
        # SD3's eq. 23 with sqrt(m / n) = shift.
        assert moved == pytest.approx(shift * t / (1 + (shift - 1) * t))
        # LightningDiT writes the same formula with its clock turned round.
        other = 1 - t
        theirs = (1 / shift) * other / (1 + (1 / shift - 1) * other)
        assert 1 - moved == pytest.approx(theirs)
    assert shift_times(torch.tensor([0.0, 1.0]), shift).tolist() == [0.0, 1.0]


def test_a_shifted_logit_normal_is_a_logit_normal() -> None:
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted, plain = Shifted(LogitNormal(0.2, 0.7), 3.0), LogitNormal(0.2 + math.log(3.0), 0.7)
    torch.testing.assert_close(shifted.quantile(u), plain.quantile(u))
    torch.testing.assert_close(shifted.density(u), plain.density(u))


@pytest.mark.parametrize('distribution', EVERY, ids=repr)
def test_density_outside_is_zero_and_never_nan(distribution: TimeDistribution) -> None:
    assert torch.equal(distribution.density(torch.tensor([-0.5, -0.1, 1.1, 2.0])), torch.zeros(4))
    assert distribution.density(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize('distribution', EVERY, ids=repr)
def test_extreme_quantiles_give_times_in_order_between_0_and_1(distribution: TimeDistribution) -> None:
    t = distribution.quantile(torch.tensor([2.0**-25, 0.3, 1 - 2.0**-24]))
    assert t.dtype == torch.float32
    assert 0 < t[0] < t[1] < t[2] <= 1


@pytest.mark.parametrize(('mean', 'std'), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_settings_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match='LogitNormal needs'):
        LogitNormal(mean, std)


@pytest.mark.parametrize('scale', [-1.01, 1.76, math.nan])
def test_a_mode_that_is_not_monotonous_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r'not in \[-1, 1.7519\]'):
        Mode(scale)


@pytest.mark.parametrize('shift', [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_shift_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match='shift='):
        Shifted(Uniform(), shift)


def test_a_chain_has_steps() -> None:
    with pytest.raises(ValueError, match='num_steps=0'):
        DiscreteUniform(0)
