"""Integrators of ``dx/dtime = drift(x, time)`` from noise to data (see ``Sampler``).

They draw nothing: a sample depends on its starting noise and label alone.

Shapes: B samples, C channels, H x W latent pixels.
"""

from itertools import pairwise

from torch import Tensor

from tread_composer.core.protocols import StepNoise
from tread_composer.samplers.equation import Equation, marked

__all__ = ['euler', 'heun', 'heun_step']


def euler(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /) -> Tensor:
    """Euler's method: one drift per step, first order."""
    # float64 throughout: a step adds a small difference to x, and float32 would round it off a thousand times.
    x = x_BCHW.double()
    for time, next_time in pairwise(times.double()):
        x = x + (next_time - time) * equation.drift(x, time)  # next_time - time < 0: from noise to data
    return x


@marked(corrects=True)
def heun(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /) -> Tensor:
    """Heun's method: two drifts per step, second order (EDM, arXiv 2206.00364, Algorithm 1 without churn).

    ``2 n`` drifts for n steps. Where the objective has no drift at time 0 (EDM's divides by the time), the step to 0 is
    an Euler step, and there are ``2 n - 1``.
    """
    x = x_BCHW.double()  # float64, as in `euler`
    for time, next_time in pairwise(times.double()):
        x = heun_step(equation, x, time, next_time)
    return x


def heun_step(equation: Equation, x_BCHW: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
    """One step of ``heun``: x at ``next_time``, float64."""
    slope = equation.drift(x_BCHW, time)
    ahead = x_BCHW + (next_time - time) * slope  # predicted by Euler (Algorithm 1, line 5)
    if next_time == 0 and not equation.drift_at_zero:  # line 6
        return ahead
    # Corrected by the mean slope of both ends, the trapezoidal rule (lines 7 and 8).
    return x_BCHW + (next_time - time) * (slope + equation.drift(ahead, next_time)) / 2
