"""Sampling step by step along the noise levels of a diffusion model: DDPM, which draws noise, and DDIM, which need not.

Both work for an objective that is a ``protocols.ReverseChain``, in its coordinates: x at time sigma is ``data + sigma
noise``. The predicted data are not clipped: latents have no bounds (DiT: ``clip_denoised=False``).

Shapes: B samples, C channels, H x W latent pixels.
"""

import math
from itertools import pairwise

from torch import Tensor

from tread_composer.core.protocols import StepNoise
from tread_composer.samplers.equation import Equation, needs

__all__ = ['ddim', 'ddpm']

_of_a_chain = needs(
    'transition',
    "walks the discrete steps of the objective 'ddpm'",
    "take 'heun', or 'euler', which is what DDIM is there",
)


@_of_a_chain
def ddpm(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /) -> Tensor:
    """Ancestral sampling: each step draws from the reverse chain (Ho et al. 2020, arXiv 2006.11239, Algorithm 2).

    The chain is the one that visits ``times`` only; its variances are the chain's own.
    """
    x = x_BCHW.double()
    for step, (time, next_time) in enumerate(pairwise(times.double())):
        mean, std = equation.transition(x, time, next_time)  # [B, C, H, W] both
        # Algorithm 2, line 3: z = 0 in the last step, which is to the data themselves.
        x = mean if next_time == 0 else mean + std * noise(step).double()
    return x


@_of_a_chain
def ddim(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /, *, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), which draws nothing with ``eta`` 0.

    ``eta`` in [0, 1] is the share of the true posterior's standard deviation that each step draws anew.

    Raises:
        ValueError: ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f'eta={eta} must be between 0 (draws nothing) and 1 (draws as much as the true posterior)')
    x = x_BCHW.double()  # data + sigma noise: x_t over sqrt(alpha_bar)
    for step, (time, next_time) in enumerate(pairwise(times.double())):
        # Eq. 16 in noise levels: with eta 1 the posterior's deviation. 0 in a step to 0.
        fresh = eta * float(next_time / time) * math.sqrt(time**2 - next_time**2)
        # The drift takes the noise down so far that, with the fresh noise, the level is next_time: variances add up.
        x = x + (math.sqrt(next_time**2 - fresh**2) - float(time)) * equation.drift(x, time)
        if fresh:
            x = x + fresh * noise(step).double()
    return x
