"""Draws from the posterior of a variational autoencoder.

Legend: B images, C channels of the latent, h x w latent pixels.
"""

import torch
from torch import Tensor

__all__ = ['sample_moments']


def sample_moments(moments_B2Chw: Tensor, noise_BChw: Tensor) -> Tensor:
    """Draws from a posterior (Kingma & Welling 2013, arXiv 1312.6114, section 2.4): float32 ``[B, C, h, w]``.

    ``mean + exp(logvar / 2) * noise``. The moments are means, then log-variances, widened before the exponential; noise
    is standard normal, and zeros give the means.

    Raises:
        ValueError: The shapes do not belong together.
    """
    batch, channels, *size = noise_BChw.shape
    if moments_B2Chw.shape != (batch, 2 * channels, *size):
        raise ValueError(
            f'moments {tuple(moments_B2Chw.shape)} and noise {tuple(noise_BChw.shape)} do not belong together: '
            f'moments hold means and log-variances, twice the channels of the noise and else its shape'
        )
    mean_BChw, logvar_BChw = moments_B2Chw.float().chunk(2, dim=1)
    return mean_BChw + torch.exp(0.5 * logvar_BChw) * noise_BChw.float()
