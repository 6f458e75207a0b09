"""Flow matching on the straight path between data and noise (Lipman et al. 2022, arXiv 2210.02747; SiT, 2401.08740).

t = 0 is data and t = 1 is noise, so the velocity to learn is ``noise - data``. SiT writes it the other way round.

Shapes: B samples, C channels, H x W latent pixels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tread_composer.objectives.prediction import predict, squared_error
from tread_composer.objectives.timesteps import LogitNormal
from tread_composer.protocols import Denoiser, Drift, TimeDistribution

__all__ = ['FlowMatching']


@dataclass(frozen=True)
class FlowMatching:
    """Learn the velocity of ``x_t = (1 - t) x + t noise``; the denoiser is told ``t``, unscaled.

    Args:
        time_distribution: How training times are spread. The default is that of TREAD's code (logit-normal, 0 and 1).
    """

    time_distribution: TimeDistribution = field(default_factory=LogitNormal)

    def __call__(
        self, denoiser: Denoiser, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor, quantiles_B: Tensor, /
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocity per sample, ``{'loss': [B]}`` in float32; see ``protocols.Objective``."""
        x, noise = latents_BCHW.float(), noise_BCHW.float()
        t_B = self.time_distribution.quantile(quantiles_B.float())
        t = t_B.view(-1, 1, 1, 1)
        velocity = predict(denoiser, (1 - t) * x + t * noise, t_B, labels_B)
        return {'loss': squared_error(velocity, noise - x)}

    def drift(self, denoiser: Denoiser, labels_B: Tensor) -> Drift:
        """``dx/dt = velocity``: what the denoiser predicts, in float64."""

        def velocity(x_BCHW: Tensor, time: Tensor) -> Tensor:
            t_B = time.to(x_BCHW.device).expand(x_BCHW.shape[0])
            return predict(denoiser, x_BCHW, t_B, labels_B).double()

        return velocity

    def sampling_times(self, num_steps: int) -> Tensor:
        """``num_steps + 1`` equidistant times from 1 to 0, float64.

        Raises:
            ValueError: ``num_steps`` is below 1.
        """
        if num_steps < 1:
            raise ValueError(f'num_steps={num_steps}: sampling takes at least 1 step')
        return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """At t = 1 there is nothing but noise: the noise itself, float64."""
        return noise_BCHW.double()
