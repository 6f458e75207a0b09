"""Samplers by the names that configurations use, and what each of them needs of an objective.

Shapes: B samples, C channels, H x W latent pixels.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tread_composer.core.protocols import Denoiser, Objective, StepNoise, StochasticSampler
from tread_composer.samplers.ddpm import ddim, ddpm
from tread_composer.samplers.ode import SAMPLERS
from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = ['STOCHASTIC_SAMPLERS', 'check_sampler', 'integrate']

STOCHASTIC_SAMPLERS: dict[str, StochasticSampler] = {'ddim': ddim, 'ddpm': ddpm, 'edm_heun': edm_heun, 'sde': sde}
_CHAIN = (
    'transition',
    "walks the discrete steps of the objective 'ddpm'",
    "take 'heun', or 'euler', which is what DDIM is there",
)
# What a sampler needs of an objective: the attribute that tells, what it does with it, and what to take without it.
_NEEDS = {
    'ddim': _CHAIN,
    'ddpm': _CHAIN,
    'edm_heun': ('denoise', "adds noise to the noise levels of the objective 'edm'", "take 'heun', which adds none"),
    'sde': ('score', "follows the stochastic equation of the objective 'flow_matching'", "take 'heun' or 'euler'"),
}


def check_sampler(name: str, objective: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse a sampler that does not exist, does not fit the objective or does not have these settings.

    Args:
        name: The sampler's name.
        objective: An objective, or the class of one.
        settings: Keyword arguments for the sampler.

    Raises:
        ValueError: Says which, and what to take instead.
    """
    known = sorted([*SAMPLERS, *STOCHASTIC_SAMPLERS])
    if name not in known:
        raise ValueError(f'{name!r} is none of {known}')
    if name in _NEEDS and not hasattr(objective, _NEEDS[name][0]):
        kind = objective if isinstance(objective, type) else type(objective)
        _, does, instead = _NEEDS[name]
        raise ValueError(f'{name!r} {does}, which {kind.__name__} does not have; {instead}')
    unknown = sorted(set(settings or {}) - set(_settings_of(name)))
    if unknown:
        raise ValueError(f'{name!r} has no settings {unknown}; it has {_settings_of(name) or "none"}')


def integrate(
    name: str,
    objective: Objective,
    denoiser: Denoiser,
    labels_B: Tensor,
    x_BCHW: Tensor,
    times: Tensor,
    noise: StepNoise,
    settings: Mapping[str, Any] | None = None,
) -> Tensor:
    """From ``x_BCHW`` at ``times[0]`` to x at ``times[-1]`` by the sampler of this name, float64.

    Raises:
        ValueError: As ``check_sampler``, or a setting is out of range.
    """
    check_sampler(name, objective, settings)
    if name in SAMPLERS:
        return SAMPLERS[name](objective.drift(denoiser, labels_B), x_BCHW, times)
    sampler: Any = STOCHASTIC_SAMPLERS[name]  # Any: each has settings of its own
    return sampler(objective, denoiser, labels_B, x_BCHW, times, noise, **settings or {})


def _settings_of(name: str) -> list[str]:
    if name in SAMPLERS:
        return []
    parameters = inspect.signature(STOCHASTIC_SAMPLERS[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
