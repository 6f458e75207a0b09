"""Integrators of ``dx/dtime = drift(x, time)`` from noise to data, in float64 (``protocols.Sampler``).

They draw nothing: a sample depends on its starting noise and label alone. Call them under ``torch.no_grad()``.

Shapes: B samples, C channels, H x W latent pixels.
"""

from itertools import pairwise

from torch import Tensor

from tread_composer.core.protocols import Drift, Sampler

__all__ = ['SAMPLERS', 'euler', 'heun']


def euler(drift: Drift, x_BCHW: Tensor, times: Tensor, /) -> Tensor:
    """Euler's method: one drift per step, first order.

    Args:
        drift: The right-hand side.
        x_BCHW: The start, at ``times[0]``.
        times: ``[num_steps + 1]``, in the order to walk.

    Returns:
        x at ``times[-1]``, float64.
    """
    x = x_BCHW.double()
    for now, then in pairwise(times.double()):
        x = x + (then - now) * drift(x, now)
    return x


def heun(drift: Drift, x_BCHW: Tensor, times: Tensor, /) -> Tensor:
    """Heun's method: two drifts per step, second order (EDM, arXiv 2206.00364, Algorithm 1 without churn).

    A step to time 0 is an Euler step, since EDM's drift divides by the time there: ``2 n - 1`` drifts for n steps.

    Args:
        drift: The right-hand side.
        x_BCHW: The start, at ``times[0]``.
        times: ``[num_steps + 1]``, in the order to walk.

    Returns:
        x at ``times[-1]``, float64.
    """
    x = x_BCHW.double()
    for now, then in pairwise(times.double()):
        slope = drift(x, now)
        ahead = x + (then - now) * slope
        x = ahead if then == 0 else x + (then - now) * (slope + drift(ahead, then)) / 2
    return x


SAMPLERS: dict[str, Sampler] = {'euler': euler, 'heun': heun}
