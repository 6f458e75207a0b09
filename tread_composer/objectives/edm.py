"""EDM (Karras et al. 2022, arXiv 2206.00364): a preconditioned denoiser, and the sigma schedule to sample it with.

The time of its sampling equation is the noise level sigma itself: 0 is data, ``sigma_max`` is noise.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tread_composer.core.bounds import Positive
from tread_composer.core.options import Checked
from tread_composer.core.protocols import Denoiser, Drift
from tread_composer.objectives.prediction import predict, squared_error
from tread_composer.objectives.snr import SNRDistribution, from_times
from tread_composer.objectives.timesteps import LogitNormal

__all__ = ['EDM']


@dataclass(frozen=True)
class EDM(Checked):
    """Learn to denoise ``x + sigma noise`` (Table 1 of the paper, column "Ours").

    Args:
        P_mean: Mean of ``ln(sigma)`` in training.
        P_std: Standard deviation of ``ln(sigma)`` in training.
        sigma_data: The data's standard deviation as the preconditioning assumes it. TREAD and MaskDiT keep 0.5 for
            SD-VAE latents, whose standard deviation is about 0.82 after the usual scaling.
        sigma_min: Lowest noise level of sampling before 0.
        sigma_max: Highest noise level of sampling.
        rho: Bends the sampling schedule; higher puts more steps at low noise.

    Raises:
        ValueError: A setting is out of range, ``sigma_min`` is not below ``sigma_max``, or ``rho`` bends too far.
    """

    name: ClassVar[str] = 'edm'
    prediction: ClassVar[str] = "EDM's network F; the denoised latents are c_skip x + c_out F(c_in x, ln(sigma) / 4)"
    time_convention: ClassVar[str] = 't=0 data, t=1 noise; the network is told ln(sigma) / 4, sigma = 0 is data'
    learned_variance: ClassVar[bool] = False
    drift_at_zero: ClassVar[bool] = False  # (x - D(x; sigma)) / sigma
    continuous_times: ClassVar[bool] = True

    P_mean: float = -1.2
    P_std: Positive = 1.2
    sigma_data: Positive = 0.5
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f'EDM: sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}')
        try:
            high, low = self._bent_ends()
            lowest = (high + (low - high)) ** self.rho  # as the schedule computes it
        except OverflowError:
            lowest = 0.0
        if not lowest > 0:  # the drift divides by it
            raise ValueError(
                f'EDM: rho={self.rho} with sigma_min={self.sigma_min} and sigma_max={self.sigma_max}: a schedule of '
                'such numbers leaves the range of float64; take a rho near 7, or a higher sigma_min'
            )

    def time_grid(self) -> dict[str, Any]:
        """See ``protocols.Objective``."""
        return {'sigma_min': self.sigma_min, 'sigma_max': self.sigma_max, 'rho': self.rho}

    def target(self) -> dict[str, Any]:
        """See ``protocols.Objective``: the preconditioning decides what F is."""
        return {'sigma_data': self.sigma_data}

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        """Any will do."""

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Weighted squared error of the denoised latents per sample, ``{'loss': [B]}`` in float32.

        See ``protocols.Objective``. The weight makes the effective weight on the network's own output 1 (appendix B.6).
        """
        x = latents_BCHW.float()
        noisy, sigma_B = self.training_noise(x, noise_BCHW, quantiles_B)
        return {'loss': self.weight(sigma_B) * squared_error(self.denoise(denoiser, noisy, sigma_B, labels_B), x)}

    def training_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents ``x + sigma noise`` of a training batch and their noise levels ``[B]``, both float32."""
        # ln(sigma) ~ N(P_mean, P_std^2) (Table 1, training): ndtri is the normal quantile function.
        sigma_B = torch.exp(self.P_mean + self.P_std * torch.special.ndtri(quantiles_B.float()))
        return latents_BCHW.float() + sigma_B.view(-1, 1, 1, 1) * noise_BCHW.float(), sigma_B

    def weight(self, sigma_B: Tensor) -> Tensor:
        """The weight on the squared error of the denoised latents (Table 1)."""
        return (sigma_B**2 + self.sigma_data**2) / (sigma_B * self.sigma_data) ** 2

    def denoise(self, denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, labels_B: Tensor) -> Tensor:
        """The denoised latents ``D(x; sigma)`` of noisy ones, in the dtype of ``x`` and ``sigma`` (eq. 7).

        The network F runs in float32 and is given ``ln(sigma) / 4``; the coefficients are those of Table 1.
        """
        # Input and target of F have variance 1 where the data's deviation is sigma_data.
        variance_B = sigma_B**2 + self.sigma_data**2
        c_skip = (self.sigma_data**2 / variance_B).view(-1, 1, 1, 1)
        c_out = (sigma_B * self.sigma_data / variance_B.sqrt()).view(-1, 1, 1, 1)
        # [B, 1, 1, 1] each.
        c_in = variance_B.rsqrt().view(-1, 1, 1, 1)
        c_noise_B = sigma_B.log() / 4
        return c_skip * x_BCHW + c_out * predict(denoiser, c_in * x_BCHW, c_noise_B, labels_B).to(x_BCHW.dtype)

    def noise_level(self, time: float) -> float:
        """``t / (1 - t)``: the noise levels are those of the straight path."""
        return time / (1 - time)  # sigma of (1 - t) x + t noise, over the factor 1 - t of the data

    def noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, time: float) -> tuple[Tensor, float]:
        """``x + sigma noise``, and sigma, which is the time of the sampling equation."""
        sigma = self.noise_level(time)
        return latents_BCHW + sigma * noise_BCHW, sigma

    def snr(self, data_std: float) -> SNRDistribution:
        """What signal-to-noise ratios it trains on: the weight on the network's own output is 1 (appendix B.6)."""
        return from_times(LogitNormal(self.P_mean, self.P_std), data_std=data_std)

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """``dx/dsigma = (x - D(x; sigma)) / sigma`` in float64 (eq. 3 with eq. 4)."""

        def slope(x_BCHW: Tensor, time: Tensor) -> Tensor:
            # Of the batch or of each sample; never 0: the last interval ends there, no call does.
            sigma_B = time.to(x_BCHW.device).expand(x_BCHW.shape[0])
            return (x_BCHW - self.denoise(denoiser, x_BCHW, sigma_B, labels_B)) / sigma_B.view(-1, 1, 1, 1)

        return slope

    def sampling_times(self, num_steps: int) -> Tensor:
        """``num_steps`` noise levels from ``sigma_max`` to ``sigma_min``, then 0, float64 (eq. 5).

        Raises:
            ValueError: ``num_steps`` is below 1.
        """
        if num_steps < 1:
            raise ValueError(f'num_steps={num_steps}: sampling takes at least 1 step')
        # i / (num_steps - 1) for i = 0, 1, ...
        ramp = torch.linspace(0.0, 1.0, num_steps, dtype=torch.float64)  # one step: sigma_max, then 0
        # Equidistant in sigma^(1 / rho).
        high, low = self._bent_ends()
        return torch.cat([(high + ramp * (low - high)) ** self.rho, ramp.new_zeros(1)])

    def _bent_ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """At ``sigma_max`` the data is negligible: ``sigma_max * noise``, float64."""
        # Exactly N(0, sigma_max^2 + sigma_data^2): at 80 and 0.5 the deviations differ by 2e-5 of themselves.
        return noise_BCHW.double() * self.sigma_max
