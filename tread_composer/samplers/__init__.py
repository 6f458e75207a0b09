"""From noise to data: samplers of an objective's equation, and guidance, which makes a denoiser out of a denoiser."""

from tread_composer.samplers.ddpm import ddim, ddpm
from tread_composer.samplers.equation import Clock, Equation, Sampler, needs
from tread_composer.samplers.guidance import autoguidance, classifier_free, within_interval, without_label
from tread_composer.samplers.guidance_sparse import sparse_guidance
from tread_composer.samplers.guided import SamplingCost, check_guidance, guidance_cost, guided_denoiser
from tread_composer.samplers.ode import euler, heun
from tread_composer.samplers.registry import SAMPLERS, check_sampler, integrate, sampler_named
from tread_composer.samplers.settings import SamplingSettings
from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = [
    'SAMPLERS',
    'Clock',
    'Equation',
    'Sampler',
    'SamplingCost',
    'SamplingSettings',
    'autoguidance',
    'check_guidance',
    'check_sampler',
    'classifier_free',
    'ddim',
    'ddpm',
    'edm_heun',
    'euler',
    'guidance_cost',
    'guided_denoiser',
    'heun',
    'integrate',
    'needs',
    'sampler_named',
    'sde',
    'sparse_guidance',
    'within_interval',
    'without_label',
]
