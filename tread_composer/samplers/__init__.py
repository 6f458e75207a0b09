"""From noise to data: samplers of an objective's equation, and guidance, which makes a denoiser out of a denoiser."""

from tread_composer.samplers.ddpm import ddim, ddpm
from tread_composer.samplers.guidance import (
    Clock,
    autoguidance,
    classifier_free,
    clocked,
    within_interval,
    without_label,
)
from tread_composer.samplers.guidance_sparse import sparse_guidance
from tread_composer.samplers.guided import SamplingCost, check_guidance, guidance_cost, guided_denoiser
from tread_composer.samplers.ode import SAMPLERS, euler, heun
from tread_composer.samplers.registry import STOCHASTIC_SAMPLERS, check_sampler, integrate
from tread_composer.samplers.settings import SamplingSettings
from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = [
    'SAMPLERS',
    'STOCHASTIC_SAMPLERS',
    'Clock',
    'SamplingCost',
    'SamplingSettings',
    'autoguidance',
    'check_guidance',
    'check_sampler',
    'classifier_free',
    'clocked',
    'ddim',
    'ddpm',
    'edm_heun',
    'euler',
    'guidance_cost',
    'guided_denoiser',
    'heun',
    'integrate',
    'sde',
    'sparse_guidance',
    'within_interval',
    'without_label',
]
