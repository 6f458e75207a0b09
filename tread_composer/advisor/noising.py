"""Noisy latents at a time of our choice, and the network called on them as its objective calls it.

Shapes: B samples, C channels, H x W latent pixels.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.objectives.timesteps import DiscreteUniform

__all__ = ['network_call', 'noise_level']


def noise_level(objective: object, time: float) -> float:
    """Standard deviation of the noise over that of what multiplies the data, at ``time`` in (0, 1).

    ``t / (1 - t)`` for flow matching, and for EDM, whose noise levels are those of the same straight path; for DDPM
    that of timestep ``floor(t T)``.

    Raises:
        ValueError: The objective is none of this package's.
    """
    if isinstance(objective, FlowMatching | EDM):
        return time / (1 - time)
    if isinstance(objective, DDPM):
        step = DiscreteUniform(objective.num_timesteps).step(torch.tensor(time, dtype=torch.float64))
        alpha_bar = objective.alphas_cumprod[step]
        return float(((1 - alpha_bar) / alpha_bar).sqrt())
    raise ValueError(f'{type(objective).__name__}: how this objective adds noise is not known here')


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
    if isinstance(model.objective, FlowMatching):
        noisy, at = (1 - time) * x + time * noise, time
    else:  # the time of these sampling equations is the noise level, and their x is data + level noise
        at = noise_level(model.objective, time)
        noisy = x + at * noise
    drift = model.objective.drift(model.denoiser, labels_B)  # type: ignore[arg-type]
    return functools.partial(drift, noisy, torch.tensor(at, dtype=torch.float64))
