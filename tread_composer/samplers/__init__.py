"""From noise to data: samplers of an objective's equation, and guidance, which makes a denoiser out of a denoiser."""

from tread_composer.samplers.ddpm import ddim, ddpm
from tread_composer.samplers.guidance import classifier_free
from tread_composer.samplers.ode import SAMPLERS, euler, heun
from tread_composer.samplers.registry import STOCHASTIC_SAMPLERS, check_sampler, integrate

__all__ = [
    'SAMPLERS',
    'STOCHASTIC_SAMPLERS',
    'check_sampler',
    'classifier_free',
    'ddim',
    'ddpm',
    'euler',
    'heun',
    'integrate',
]
