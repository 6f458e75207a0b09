"""SNR densities: FasterDiT's schedules against a table made by drawing, and against their own definition."""

import math

import numpy as np
import pytest
import torch

from tread_composer.objectives import DDPM, EDM, CosMap, FlowMatching, LogitNormal, MinSNR, Mode, Shifted, Uniform
from tread_composer.objectives.snr import SNRDistribution

# Mean, standard deviation, 5 %, 50 %, 95 % in dB for data of standard deviation 1, from two million drawn times
# (methods.md, section 2.1). lognorm(m, s) is written there with t = 1 at the data: here the mean's sign is the other.
TABLE = {
    'DDPM linear': (DDPM().snr(1.0), (-11.7, 16.9, -39.7, -10.7, 15.3)),
    'DDPM cosine': (DDPM(schedule='cosine').snr(1.0), (-0.4, 13.3, -22.3, -0.1, 20.9)),
    'flow, uniform': (FlowMatching(Uniform()).snr(1.0), (0.0, 15.7, -25.6, 0.0, 25.6)),
    'flow, lognorm(0, 1)': (FlowMatching().snr(1.0), (0.0, 8.7, -14.3, 0.0, 14.3)),
    'flow, lognorm(-0.5, 1)': (FlowMatching(LogitNormal(0.5, 1.0)).snr(1.0), (-4.3, 8.7, -18.6, -4.4, 10.0)),
    'flow, lognorm(0.5, 0.6)': (FlowMatching(LogitNormal(-0.5, 0.6)).snr(1.0), (4.3, 5.2, -4.2, 4.3, 12.9)),
    'flow, cosmap': (FlowMatching(CosMap()).snr(1.0), (0.0, 13.6, -22.1, 0.0, 22.1)),
    'EDM': (EDM().snr(1.0), (10.4, 10.4, -6.7, 10.4, 27.6)),
}
MORE = [
    FlowMatching(Shifted(Mode(0.9), 2.0), weighting=MinSNR()).snr(0.6),
    FlowMatching(Uniform(), weighting=MinSNR(3.0)).snr(1.0),
    DDPM(weighting=MinSNR()).snr(0.82),
]


@pytest.mark.parametrize('name', TABLE)
def test_the_published_table(name: str) -> None:
    snr, expected = TABLE[name]
    assert [snr.mean, snr.std, *snr.quantiles] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize('snr', [*(snr for snr, _ in TABLE.values()), *MORE])
def test_the_drawn_density_is_that_of_the_figures(snr: SNRDistribution) -> None:
    """Integral, mean and spread of the curve are those of the drawn times; a chain of steps lacks half a step."""
    y, f = snr.decibels, snr.density
    # Half of the first and of the last step of a chain lie beyond the curve, and they lie far out.
    is_chain = len(y) == 999
    assert (y.diff() > 0).all() and (f >= 0).all()
    assert torch.trapezoid(f, y) == pytest.approx(1, abs=3e-3 if is_chain else 1e-3)
    mean = torch.trapezoid(f * y, y)
    assert mean == pytest.approx(snr.mean, abs=0.06 if is_chain else 0.01)
    assert torch.trapezoid(f * (y - mean).square(), y).sqrt() == pytest.approx(snr.std, abs=0.25 if is_chain else 0.01)
    below = torch.cumulative_trapezoid(f, y)
    for level, quantile in zip((0.05, 0.5, 0.95), snr.quantiles, strict=True):
        assert np.interp(quantile, y[1:], below) == pytest.approx(level, abs=3e-3 if is_chain else 1e-3)


@pytest.mark.parametrize('objective', [FlowMatching(Uniform()), FlowMatching(CosMap()), EDM(), DDPM()])
def test_the_strength_of_the_data_moves_all_of_it(objective: FlowMatching | EDM | DDPM) -> None:
    plain, strong = objective.snr(1.0), objective.snr(0.5)
    for before, after in zip([plain.mean, *plain.quantiles], [strong.mean, *strong.quantiles], strict=True):
        assert after - before == pytest.approx(20 * math.log10(0.5))
    assert strong.std == pytest.approx(plain.std)


def test_a_time_shift_and_a_weaker_signal_are_the_same_on_the_straight_path() -> None:
    shifted = FlowMatching(Shifted(LogitNormal(), 2.0)).snr(1.0)
    weaker = FlowMatching().snr(0.5)
    assert [shifted.mean, *shifted.quantiles] == pytest.approx([weaker.mean, *weaker.quantiles], abs=1e-6)


def test_cosmap_spreads_the_snr_as_the_cosine_path_does() -> None:
    """``alpha / sigma = cot(pi u / 2)`` with u uniform: the logarithm has the density ``1 / (pi cosh)``."""
    snr = FlowMatching(CosMap()).snr(1.0)
    per_decibel = math.log(10) / 20
    torch.testing.assert_close(snr.density, per_decibel / (math.pi * (per_decibel * snr.decibels).cosh()))


def test_a_weight_counts_like_more_samples() -> None:
    """The mean under a weight, from its definition: sums over the chain, in plain Python."""
    distribution = DDPM(weighting=MinSNR(5.0)).snr(1.0)
    total = weights = 0.0
    alpha_bar = 1.0
    for step in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        snr = alpha_bar / (1 - alpha_bar)
        weight = min(snr, 5.0) / snr
        total, weights = total + weight * 10 * math.log10(snr), weights + weight
    assert distribution.mean == pytest.approx(total / weights, abs=1e-6)
