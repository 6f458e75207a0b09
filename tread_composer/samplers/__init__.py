"""From noise to data: samplers of an objective's equation, and guidance by a weaker prediction."""

from tread_composer.samplers.ddpm import ddim, ddpm
from tread_composer.samplers.equation import Clock, Equation, Sampler, needs
from tread_composer.samplers.guidance import GUIDANCE, default_guidance, guidance_defaults
from tread_composer.samplers.guided import SamplingCost, check_guidance, guidance_cost, guided_denoiser
from tread_composer.samplers.ode import euler, heun
from tread_composer.samplers.registry import SAMPLERS, check_sampler, integrate, sampler_named
from tread_composer.samplers.settings import SamplingSettings
from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = [
    'GUIDANCE',
    'SAMPLERS',
    'Clock',
    'Equation',
    'Sampler',
    'SamplingCost',
    'SamplingSettings',
    'check_guidance',
    'check_sampler',
    'ddim',
    'ddpm',
    'default_guidance',
    'edm_heun',
    'euler',
    'guidance_cost',
    'guidance_defaults',
    'guided_denoiser',
    'heun',
    'integrate',
    'needs',
    'sampler_named',
    'sde',
]
