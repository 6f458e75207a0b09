"""How much signal an objective trains on: the density of the signal-to-noise ratio in decibels (FasterDiT).

FasterDiT (arXiv 2410.10356, section 3) measures ``SNR = std^2 alpha^2 / sigma^2``, in dB
``20 lg(std) + 20 lg(alpha / sigma)``, with ``x_t = alpha x + sigma noise`` and ``std`` the standard deviation of the
latents as the network sees them. (The paper's further constant of the data set, ``10 lg C``, is unknown and left out.)
The training times and the loss weight make a density of t, and that one of the SNR. The plain error of what the network
itself puts out counts as weight 1, so EDM, whose effective weight is 1, has the density of its noise levels.

Everything here is exact: densities follow from those of the times by the slope of the path, without a histogram.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tread_composer.core.protocols import TimeDistribution, Weighting

__all__ = ['SNRDistribution', 'from_steps', 'from_times', 'to_decibels']

_PER_NEPER = 20 / math.log(10)  # dB for a factor e in alpha / sigma
_NUM_QUANTILES = 200_000
_LOWEST, _HIGHEST, _STEP = -100.0, 100.0, 0.1  # dB, the drawn range before the data's strength moves it


@dataclass(frozen=True)
class SNRDistribution:
    """What SNR an objective trains on, in dB."""

    decibels: Tensor  # where the density is given, ascending [K], float64
    density: Tensor  # probability per dB [K], float64
    mean: float  # dB
    std: float  # dB
    quantiles: tuple[float, float, float]  # 5 %, 50 % and 95 %, dB


def to_decibels(log_ratio: Tensor, data_std: float = 1.0) -> Tensor:
    """``20 lg(data_std alpha / sigma)`` from ``ln(alpha / sigma)``.

    Raises:
        ValueError: ``data_std`` is not positive.
    """
    if not (math.isfinite(data_std) and data_std > 0):
        raise ValueError(f'data_std={data_std} must be positive and finite')
    return _PER_NEPER * (log_ratio + math.log(data_std))


def from_times(
    times: TimeDistribution, *, data_std: float = 1.0, weighting: Weighting | None = None
) -> SNRDistribution:
    """The distribution of the straight path ``(1 - t) x + t noise``: ``f(dB) = f_t(t) w(t) |dt / d dB| / E[w]``.

    EDM's too, whose noise level is ``t / (1 - t)``. ``data_std`` is the standard deviation of the latents as the
    network sees them; ``weighting`` is the loss weight on the velocity, 1 if None.
    """

    def log_ratio(t: Tensor) -> Tensor:  # ln(alpha / sigma) = ln((1 - t) / t)
        return -torch.logit(t)

    def weight(t: Tensor) -> Tensor:
        # SNR = (alpha / sigma)^2.
        return torch.ones_like(t) if weighting is None else weighting(torch.exp(2 * log_ratio(t)), 'flow')

    # Equally likely times: their means are means over the distribution, whatever it is.
    u = (torch.arange(_NUM_QUANTILES, dtype=torch.float64) + 0.5) / _NUM_QUANTILES
    t_drawn = times.quantile(u)
    weights = weight(t_drawn)
    # An even grid in dB, as natural logarithms, and the times that belong to it.
    grid = torch.arange(_LOWEST, _HIGHEST + _STEP / 2, _STEP, dtype=torch.float64) / _PER_NEPER
    t = torch.sigmoid(-grid)
    slope = t * (1 - t)  # |dt / d ln(alpha / sigma)|; per dB it is divided by dB per neper
    density = times.density(t) * slope / _PER_NEPER * weight(t) / weights.mean()
    drawn = to_decibels(log_ratio(t_drawn), data_std)
    return _summary(to_decibels(grid, data_std), density, drawn, weights)


def from_steps(alphas_cumprod: Tensor, *, data_std: float = 1.0, weights: Tensor | None = None) -> SNRDistribution:
    """The distribution of a discrete chain whose T steps are equally likely (DDPM).

    Mean, standard deviation and quantiles are those of the T values. The density is that of the straight lines between
    neighbours, each of which holds the mean of their masses. ``alphas_cumprod`` falls, float64 ``[T]``; ``weights`` are
    the loss weights of the steps ``[T]`` beside that of the prediction, 1 if None; ``data_std`` as for ``from_times``.
    """
    log_ratio = (alphas_cumprod / (1 - alphas_cumprod)).log() / 2  # ln(alpha / sigma): half of ln SNR
    decibels = to_decibels(log_ratio, data_std).flip(0)  # the chain falls, the result ascends
    weights = torch.ones_like(decibels) if weights is None else weights.double().flip(0)
    # T - 1 intervals; each holds half of the mass of both ends.
    masses = (weights[1:] + weights[:-1]) / 2 / weights.sum()
    middles = (decibels[1:] + decibels[:-1]) / 2
    return _summary(middles, masses / decibels.diff(), decibels, weights)


def _summary(decibels: Tensor, density: Tensor, drawn: Tensor, weights: Tensor) -> SNRDistribution:
    shares = weights / weights.sum()
    mean = float((shares * drawn).sum())
    std = math.sqrt(float((shares * (drawn - mean).square()).sum()))
    values, order = drawn.sort()
    below = shares[order].cumsum(0)  # the distribution function at each value
    quantiles = _quantile(values, below, 0.05), _quantile(values, below, 0.5), _quantile(values, below, 0.95)
    return SNRDistribution(decibels, density, mean, std, quantiles)


def _quantile(values: Tensor, below: Tensor, level: float) -> float:
    # Between two steps of a chain a whole interval has this share below it: the end away from the median is taken, so
    # that 5 % to 95 % holds 90 % of the steps, and for the median the middle.
    ends = torch.tensor([level - 1e-9, level + 1e-9], dtype=torch.float64)
    low, high = values[torch.searchsorted(below, ends).clamp(max=len(values) - 1)].tolist()
    if level == 0.5:
        return (low + high) / 2
    return low if level < 0.5 else high
