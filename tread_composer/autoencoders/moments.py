"""Draws from the posterior of a variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114, section 2.4).

Legend: B images, C latent channels, H x W latent pixels.
"""

import torch
from torch import Tensor

__all__ = ['sample_moments']


def sample_moments(moments_B2CHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Raw latents ``mean + exp(logvar / 2) * noise``, float32 ``[B, C, H, W]``.

    Args:
        moments_B2CHW: Means, then log-variances. Half precision is widened before the exponential.
        noise_BCHW: Standard normal; zeros give the means.

    Raises:
        ValueError: The shapes do not belong together.
    """
    batch, channels, *size = noise_BCHW.shape
    if moments_B2CHW.shape != (batch, 2 * channels, *size):
        raise ValueError(
            f'moments {tuple(moments_B2CHW.shape)} and noise {tuple(noise_BCHW.shape)} do not belong together: '
            f'moments hold means and log-variances, twice the channels of the noise and else its shape'
        )
    mean_BCHW, logvar_BCHW = moments_B2CHW.float().chunk(2, dim=1)
    return mean_BCHW + torch.exp(0.5 * logvar_BCHW) * noise_BCHW.float()
