"""What the parts promise each other. Nobody inherits from these; they are for readers and for the type checker.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ['Autoencoder', 'Denoiser', 'Drift', 'Objective', 'Sampler', 'TimeDistribution']

Drift = Callable[[Tensor, Tensor], Tensor]
"""``drift(x_BCHW, time) -> dx/dtime``; ``time`` is a float64 scalar tensor, ``x`` float64, the result float64."""


class Denoiser(Protocol):
    """The network: noisy latents, what it is told about the noise level, labels -> prediction."""

    num_tokens: int
    """Tokens that its blocks see for one image: lets ``Tread`` draw routes before the forward pass."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        """Predict; same shape as ``x_BCHW``, or twice its channels with ``learn_sigma``."""
        ...


class TimeDistribution(Protocol):
    """How training times are spread over (0, 1); t = 0 is data, t = 1 is noise."""

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share ``u`` in (0, 1) of the training times lies."""
        ...

    def density(self, t: Tensor) -> Tensor:
        """Probability density at ``t``."""
        ...


class Objective(Protocol):
    """What is learnt, and the differential equation that turns noise into data with it."""

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Per-sample losses ``[B]``: ``'loss'`` is what is minimised, other entries are terms worth logging.

        ``quantiles_B`` in (0, 1) is uniform noise for the time draw: the objective owns the distribution.
        """
        ...

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """The right-hand side of the sampling equation for these labels."""
        ...

    def sampling_times(self, num_steps: int) -> Tensor:
        """``num_steps + 1`` descending times, float64, from pure noise to 0."""
        ...

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """The start of sampling made from standard normal noise, float64."""
        ...


class Sampler(Protocol):
    """Integrates a drift from noise to data."""

    def __call__(self, drift: Drift, x_BCHW: Tensor, times: Tensor, /) -> Tensor:
        """Walk from ``times[0]`` to ``times[-1]``."""
        ...


class Autoencoder(Protocol):
    """Pixels in [-1, 1] <-> raw latents."""

    def decode(self, raw_latents_BCHW: Tensor) -> Tensor:
        """``[B, C, H, W]`` raw latents to pixels ``[B, 1 or 3, H', W']`` in about [-1, 1]."""
        ...
