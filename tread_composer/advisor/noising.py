"""Noisy latents at a time of our choice, and the network called on them as its objective calls it.

Shapes: B samples, C channels, H x W latent pixels.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tread_composer.latent_diffusion import LatentDiffusion

__all__ = ['network_call']


def network_call(
    model: LatentDiffusion, time: float, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor
) -> Callable[[], Tensor]:
    """What runs the model's network once, on latents with noise, told of the noise level in its objective's way.

    Args:
        model: On the device of the tensors.
        time: In (0, 1), 0 is data.
        latents_BCHW: As the network sees them, without noise.
        labels_B: Class ids.
        noise_BCHW: Standard normal noise.
    """
    x, noise = latents_BCHW.double(), noise_BCHW.double()
    noisy, at = model.objective.noised(x, noise, time)
    drift = model.objective.drift(model.denoiser, labels_B)  # type: ignore[arg-type]
    return functools.partial(drift, noisy, torch.tensor(at, dtype=torch.float64))
