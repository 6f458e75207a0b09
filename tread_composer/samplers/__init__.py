"""From noise to data: integrators of an objective's drift, and guidance, which makes a denoiser out of a denoiser."""

from tread_composer.samplers.guidance import classifier_free
from tread_composer.samplers.ode import SAMPLERS, euler, heun

__all__ = ['SAMPLERS', 'classifier_free', 'euler', 'heun']
