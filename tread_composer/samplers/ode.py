"""Integrators of ``dx/dtime = drift(x, time)`` from noise to data, in float64.

They draw nothing: a sample depends on its starting noise and label alone. Call them under ``torch.no_grad()``.

Shapes: B samples, C channels, H x W latent pixels.
"""

from itertools import pairwise

from torch import Tensor

from tread_composer.core.protocols import StepNoise
from tread_composer.samplers.equation import Equation

__all__ = ['euler', 'heun']


def euler(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /) -> Tensor:
    """Euler's method: one drift per step, first order.

    Args:
        equation: Has the drift.
        x_BCHW: The start, at ``times[0]``.
        times: ``[num_steps + 1]``, in the order to walk.
        noise: Not asked.

    Returns:
        x at ``times[-1]``, float64.
    """
    del noise
    x = x_BCHW.double()
    for time, next_time in pairwise(times.double()):
        x = x + (next_time - time) * equation.drift(x, time)
    return x


def heun(equation: Equation, x_BCHW: Tensor, times: Tensor, noise: StepNoise, /) -> Tensor:
    """Heun's method: two drifts per step, second order (EDM, arXiv 2206.00364, Algorithm 1 without churn).

    A step to time 0 is an Euler step, since EDM's drift divides by the time there: ``2 n - 1`` drifts for n steps.

    Args:
        equation: Has the drift.
        x_BCHW: The start, at ``times[0]``.
        times: ``[num_steps + 1]``, in the order to walk.
        noise: Not asked.

    Returns:
        x at ``times[-1]``, float64.
    """
    del noise
    x = x_BCHW.double()
    for time, next_time in pairwise(times.double()):
        slope = equation.drift(x, time)
        # Predict with Euler, then correct with the mean slope of both ends (the trapezoidal rule).
        ahead = x + (next_time - time) * slope
        x = ahead if next_time == 0 else x + (next_time - time) * (slope + equation.drift(ahead, next_time)) / 2
    return x
