"""Guidance: wrappers that make a denoiser out of a denoiser, so that objectives and samplers need not know.

Shapes: B samples, C channels, H x W latent pixels.
"""

import math

import torch
from torch import Tensor

from tread_composer.protocols import Denoiser

__all__ = ['classifier_free']


def classifier_free(denoiser: Denoiser, guidance_scale: float, null_label: int) -> Denoiser:
    """Guide away from the unconditional prediction (Ho and Salimans 2022, arXiv 2207.12598).

    ``unconditional + guidance_scale * (conditional - unconditional)`` on all channels of the prediction, from one call
    with a doubled batch. Output channels beyond those of the latents are the variance of a model with ``learn_sigma``:
    they are the conditional branch's, at every scale. DiT does the same, except that its scripts guide the first three
    of the four latent channels only, and leave the fourth as conditional as the variance. For EDM it makes no
    difference whether the network's output or the denoised latents are guided: the other terms are the same in both.

    Args:
        denoiser: The network, trained with ``label_dropout``.
        guidance_scale: 1 is no guidance and returns ``denoiser`` itself; 0 is unconditional but for the variance.
        null_label: The label that stands for no class.

    Raises:
        ValueError: ``guidance_scale`` is negative or not finite.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f'guidance_scale={guidance_scale}: must be 0 or more; 1 is no guidance, above 1 guides')
    return denoiser if guidance_scale == 1 else _ClassifierFree(denoiser, guidance_scale, null_label)


class _ClassifierFree:
    def __init__(self, denoiser: Denoiser, guidance_scale: float, null_label: int) -> None:
        self.denoiser, self.guidance_scale, self.null_label = denoiser, guidance_scale, null_label
        self.num_tokens = denoiser.num_tokens

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, /) -> Tensor:
        labels = torch.cat([labels_B, torch.full_like(labels_B, self.null_label)])
        both = self.denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), labels)
        # The difference of two bfloat16 predictions, times the scale, would be mostly rounding.
        conditional, unconditional = both.float().chunk(2)
        channels = x_BCHW.shape[1]
        variance = conditional[:, channels:]
        conditional, unconditional = conditional[:, :channels], unconditional[:, :channels]
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        return torch.cat([guided, variance], dim=1)
