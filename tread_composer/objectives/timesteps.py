"""How training times are spread over (0, 1): t = 0 is data, t = 1 is noise (``protocols.TimeDistribution``).

A distribution draws nothing itself: it turns uniform quantiles, which come with the batch, into times. Papers with
t = 1 at the data (SiT, LightningDiT, FasterDiT) write the same distributions with the mean's sign flipped.

EDM's noise levels, ``ln(sigma) ~ N(P_mean, P_std^2)``, have no class of their own: on the straight path
``(1 - t) x + t noise`` the noise level relative to the data is ``sigma = t / (1 - t)``, so ``ln(sigma) = logit(t)`` and
they are ``LogitNormal(P_mean, P_std)``.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from tread_composer.core.bounds import Positive
from tread_composer.core.options import Checked
from tread_composer.core.protocols import TimeDistribution

__all__ = ['CosMap', 'LogitNormal', 'Mode', 'Shifted', 'Uniform', 'check_distribution', 'shift_times']

_LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # beyond it f' changes its sign
_BISECTIONS = 60  # halves the unit interval to below float64's precision


@dataclass(frozen=True)
class Uniform:
    """All times alike (SiT, arXiv 2401.08740)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the training times lies: ``u`` itself."""
        return u

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``: 1 within [0, 1], 0 outside."""
        return _inside(t).to(t.dtype)


@dataclass(frozen=True)
class LogitNormal(Checked):
    """``logit(t) ~ N(mean, std^2)``: more of the middle (SD3, arXiv 2403.03206, section 3.1).

    Args:
        mean: Mean of ``logit(t)``; positive trains more on noisy times.
        std: Standard deviation of ``logit(t)``.
    """

    mean: Annotated[float, Ge(-100), Le(100)] = 0.0
    std: Positive = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` in (0, 1) of the training times lies."""
        # ndtri is the quantile function of N(0, 1).
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``; 0 at the ends and outside of (0, 1)."""
        # N(logit t) |d logit / dt|, and the slope of logit is 1 / (t (1 - t)) (SD3, section 3.1).
        z = (torch.logit(t) - self.mean) / self.std
        density = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), density, 0.0)  # the formula is 0 / 0 at the ends


@dataclass(frozen=True)
class Mode(Checked):
    """SD3's mode sampling with heavy tails (arXiv 2403.03206, section 3.1).

    ``t = f(u)`` with u uniform and ``f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u)``. The published f falls as u
    grows; ``quantile`` is ``f(1 - u)``.

    Args:
        scale: Positive trains more on the middle, negative more on both ends, 0 on all times alike. From -1 to
            ``2 / (pi - 2)``, about 1.75, where f is monotonous; SD3's own choice is 1.29.
    """

    scale: Annotated[float, Ge(-1), Le(_LARGEST_MODE_SCALE)] = 1.29

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the training times lies."""
        # f(1 - u): the squared cosine becomes a squared sine.
        return (u - self.scale * (torch.sin(math.pi / 2 * u).square() - u)).clamp(0.0, 1.0)

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``, 0 outside of [0, 1]; infinite at the two ends for the scale -1."""
        share = self._share_below(t.double())
        # Density = 1 / f'(u) at the u that t belongs to; f' is 0 at both ends for the scale -1.
        slope = 1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * share)
        return torch.where(_inside(t), (1 / slope.clamp(min=0.0)).to(t.dtype), 0.0)

    def _share_below(self, t: Tensor) -> Tensor:
        """The inverse of ``quantile``, which has no closed form but is monotonous: by bisection, in float64."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.quantile(middle) < t  # the root lies above the middle
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap:
    """SD3's CosMap (arXiv 2403.03206, section 3.1): times that spread the SNR as the cosine schedule does."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the training times lies: ``1 - 1 / (tan(pi u / 2) + 1)``."""
        # tan as a quotient: it has a pole at u = 1, and rounding would throw it to the far side.
        sine, cosine = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return sine / (sine + cosine)

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``: ``2 / (pi - 2 pi t + 2 pi t^2)``, 0 outside of [0, 1]."""
        return torch.where(_inside(t), 2 / (math.pi * (1 - 2 * t + 2 * t.square())), 0.0)


@dataclass(frozen=True)
class Shifted(Checked):
    """Another distribution with its times moved by ``shift_times``, for another resolution or latent strength.

    ``Shifted(LogitNormal(m, s), shift)`` is ``LogitNormal(m + ln(shift), s)``.
    """

    distribution: TimeDistribution
    shift: Positive  # above 1 trains more on noisy times; 1 changes nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distribution('Shifted: distribution', self.distribution)

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the training times lies."""
        return shift_times(self.distribution.quantile(u), self.shift)

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``: that of the unshifted time, times the slope of the inverse shift."""
        # d/dt of the inverse shift, t / (shift - (shift - 1) t).
        slope = self.shift / (self.shift - (self.shift - 1) * t).square()
        density = self.distribution.density(shift_times(t, 1 / self.shift)) * slope
        return torch.where(_inside(t), density, 0.0)  # outside, the shift has a pole


def check_distribution(name: str, value: object) -> None:
    """Refuse what spreads no times; the ``ValueError`` calls it ``name``."""
    if isinstance(value, type) or not hasattr(value, 'quantile'):  # a class has the method, and no settings
        raise ValueError(
            f'{name}: {value!r} is no distribution of times; give one such as LogitNormal() or Uniform(), or an object '
            'of yours with a method quantile(u)'
        )


def shift_times(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)``: keeps 0 (data) and 1 (noise) and multiplies the odds ``t / (1 - t)``.

    SD3 (arXiv 2403.03206, eq. 23) moves the times of n pixels to those of m pixels with ``shift = sqrt(m / n)``, in
    this convention (t = 1 is noise). LightningDiT's "timestep shift 0.3" is the same formula with t = 1 at the data;
    here it is ``shift = 1 / 0.3``. On the straight path a shift changes the SNR by ``-20 lg(shift)`` dB at every
    quantile. Above 1 it moves times towards noise, below 1 towards data.

    Raises:
        ValueError: ``shift`` is not positive.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f'shift={shift} must be positive and finite; 1 is no shift')
    return shift * t / (1 + (shift - 1) * t)


def _inside(t: Tensor) -> Tensor:
    return (t >= 0) & (t <= 1)
