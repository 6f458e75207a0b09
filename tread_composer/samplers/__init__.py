"""From noise to data: samplers of an objective's equation, and guidance by a weaker prediction."""

from typing import TYPE_CHECKING

from tread_composer.core.named import lazy_names

if TYPE_CHECKING:
    from tread_composer.samplers.adaptive import dopri5
    from tread_composer.samplers.chain import ddim, ddpm
    from tread_composer.samplers.equation import Clock, Equation, Evaluations, Sampler, needs
    from tread_composer.samplers.guidance import GUIDANCE, default_guidance, guidance_defaults, guidance_named
    from tread_composer.samplers.guided import SamplingCost, check_guidance, guidance_cost, guided_denoiser
    from tread_composer.samplers.ode import euler, heun
    from tread_composer.samplers.registry import (
        SAMPLERS,
        adaptive_settings,
        check_sampler,
        sampler_facts,
    )
    from tread_composer.samplers.settings import SamplingSettings
    from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = [
    'GUIDANCE', 'SAMPLERS', 'Clock', 'Equation', 'Evaluations', 'Sampler', 'SamplingCost', 'SamplingSettings',
    'adaptive_settings', 'check_guidance', 'check_sampler', 'ddim', 'ddpm', 'default_guidance', 'dopri5', 'edm_heun',
    'euler', 'guidance_cost', 'guidance_defaults', 'guidance_named', 'guided_denoiser', 'heun', 'needs',
    'sampler_facts', 'sde',
]  # fmt: skip

# The commands read the flags of sampling off `SamplingSettings`, and `--help` is not to load torch for them.
_NAMES = {
    'adaptive': ('dopri5',),
    'chain': ('ddim', 'ddpm'),
    'equation': ('Clock', 'Equation', 'Evaluations', 'Sampler', 'needs'),
    'guidance': ('GUIDANCE', 'default_guidance', 'guidance_defaults', 'guidance_named'),
    'guided': ('SamplingCost', 'check_guidance', 'guidance_cost', 'guided_denoiser'),
    'ode': ('euler', 'heun'),
    'registry': ('SAMPLERS', 'adaptive_settings', 'check_sampler', 'sampler_facts'),
    'settings': ('SamplingSettings',),
    'stochastic': ('edm_heun', 'sde'),
}
__getattr__ = lazy_names(__name__, {name: f'{__name__}.{module}' for module, names in _NAMES.items() for name in names})
