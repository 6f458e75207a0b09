"""Samplers that add fresh noise on the way: EDM's Heun with churn, and Euler-Maruyama on flow matching's SDE.

Shapes: B samples, C channels, H x W latent pixels.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from tread_composer.core.protocols import StepNoise
from tread_composer.samplers.equation import Equation, marked, needs
from tread_composer.samplers.ode import heun_step

__all__ = ['edm_heun', 'sde']

_LAST_STEP, _LAST_STEPS = 0.04, ('mean', 'tweedie', 'none')  # SiT's size, and its kinds
_MOST_CHURN = math.sqrt(2) - 1  # fresh noise of at most the variance that x holds: (1 + gamma)^2 = 2


@marked(corrects=True)
@needs('denoise', "adds noise to the noise levels of the objective 'edm'", "take 'heun', which adds none")
def edm_heun(
    equation: Equation,
    x_BCHW: Tensor,
    times: Tensor,
    noise: StepNoise,
    /,
    *,
    S_churn: float = 0.0,  # of the whole trajectory
    S_min: float = 0.0,  # lowest noise level with churn
    S_max: float = math.inf,  # highest noise level with churn
    S_noise: float = 1.0,  # deviation of the fresh noise over what the raised level asks for
) -> Tensor:
    """Heun's method that first raises the noise level of a step a little (EDM, arXiv 2206.00364, Algorithm 2).

    Names and defaults of the settings are the paper's; without churn it is ``heun``. A step from a noise level between
    ``S_min`` and ``S_max`` raises it by the factor ``1 + min(S_churn / num_steps, sqrt(2) - 1)`` with fresh noise,
    whose standard deviation is multiplied by ``S_noise``.

    Raises:
        ValueError: A setting is out of range.
    """
    if S_churn < 0 or S_noise < 0 or not 0 <= S_min <= S_max:
        raise ValueError(
            f'S_churn={S_churn}, S_noise={S_noise} must be 0 or more, and 0 <= S_min={S_min} <= S_max={S_max}'
        )
    gamma = min(S_churn / (len(times) - 1), _MOST_CHURN)  # line 3; N steps
    x = x_BCHW.double()
    for step, (time, next_time) in enumerate(pairwise(times.double())):
        if gamma and S_min <= float(time) <= S_max:
            raised = time * (1 + gamma)  # line 5
            # x holds noise of variance time^2; fresh noise of the difference brings it to raised^2 (line 6).
            x = x + float((raised**2 - time**2).sqrt()) * S_noise * noise(step).double()
            time = raised
        x = heun_step(equation, x, time, next_time)  # lines 7 to 11
    return x


@needs('score', "follows the stochastic equation of the objective 'flow_matching'", "take 'heun' or 'euler'")
def sde(
    equation: Equation,
    x_BCHW: Tensor,
    times: Tensor,
    noise: StepNoise,
    /,
    *,
    last_step: float = _LAST_STEP,  # in t
    diffusion: float = 1.0,  # w / t
    last_step_kind: str = 'mean',
) -> Tensor:
    """Euler-Maruyama on the reverse SDE of flow matching, as SiT samples (arXiv 2401.08740; its form ``sigma``).

    With t = 0 for data, a step of size s is ``x + s (w score - velocity) + sqrt(2 w s) noise``, with ``w = diffusion
    t`` (SiT's code calls w the diffusion; the paper's w is twice that): so much noise is added on the way and taken out
    again, and 0 is Euler's method. Each step is one network call.

    The last step, from ``t = last_step`` to 0, adds no noise. Of SiT's kinds, ``mean`` is the step above without its
    noise, and ``tweedie`` the expected data ``(x + t^2 score) / (1 - t)``, on this path the same as a step of Euler's
    method. The other steps have the spacing of ``times``, squeezed between the start and ``last_step``. With ``none``
    there is no such step: all have their noise and the spacing of ``times``.

    Raises:
        ValueError: A setting is out of range.
    """
    if not 0 < last_step < float(times[0]):
        raise ValueError(f'last_step={last_step} must be above 0 and below the first time, {float(times[0]):g}')
    if diffusion < 0:
        raise ValueError(f'diffusion={diffusion} must be 0 or more')
    if last_step_kind not in _LAST_STEPS:
        raise ValueError(f'last_step_kind={last_step_kind!r} is none of {", ".join(_LAST_STEPS)}')
    if last_step_kind == 'none' and last_step != _LAST_STEP:
        raise ValueError(f"last_step={last_step}: has no effect with last_step_kind 'none'; leave it out")
    x, times = x_BCHW.double(), times.double()
    times = times if last_step_kind == 'none' else _squeezed(times, last_step)
    for step, (time, next_time) in enumerate(pairwise(times)):
        if next_time == 0 and last_step_kind == 'tweedie':
            return x - time * equation.drift(x, time)  # the data: x = (1 - t) data + t noise, v = noise - data
        size, w = float(time - next_time), diffusion * float(time)  # w ends at 0 with the data, as the noise does
        velocity = equation.drift(x, time)
        # Time runs down, so the velocity is subtracted; the score takes out what the fresh noise below adds.
        x = x + size * (w * equation.score(x, velocity, time) - velocity)
        if w and (next_time > 0 or last_step_kind == 'none'):
            x = x + math.sqrt(2 * w * size) * noise(step).double()  # variance 2 w per unit of time
    return x


def _squeezed(times: Tensor, final_time: float) -> Tensor:
    """The times, moved so that the last one before 0 is ``final_time``."""
    if len(times) == 2:  # a single step goes all the way
        return times
    # Affine map of [times[-2], times[0]] onto [final_time, times[0]]: the spacing keeps its proportions.
    start, end = times[0], times[-2]
    return torch.cat([final_time + (times[:-1] - end) * (start - final_time) / (start - end), times.new_zeros(1)])
