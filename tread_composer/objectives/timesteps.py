"""How training times are spread over (0, 1): t = 0 is data, t = 1 is noise (``protocols.TimeDistribution``).

A distribution draws nothing itself: it turns uniform quantiles, which come with the batch, into times. Papers with
t = 1 at the data (SiT, LightningDiT, FasterDiT) write the same distributions with the mean's sign flipped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ['LogitNormal', 'Uniform']


@dataclass(frozen=True)
class Uniform:
    """All times alike (SiT, arXiv 2401.08740)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` of the training times lies: ``u`` itself."""
        return u

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``: 1 within [0, 1], 0 outside."""
        return ((t >= 0) & (t <= 1)).to(t.dtype)


@dataclass(frozen=True)
class LogitNormal:
    """``logit(t) ~ N(mean, std^2)``: more of the middle (SD3, arXiv 2403.03206, section 3.1).

    Args:
        mean: Mean of ``logit(t)``; positive trains more on noisy times.
        std: Standard deviation of ``logit(t)``.

    Raises:
        ValueError: ``std`` is not positive, or a number is not finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f'LogitNormal wants a finite mean and a positive std, got mean={self.mean}, std={self.std}'
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` in (0, 1) of the training times lies."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``; 0 at the ends and outside of (0, 1)."""
        z = (torch.logit(t) - self.mean) / self.std
        density = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), density, 0.0)  # the formula is 0 / 0 at the ends
