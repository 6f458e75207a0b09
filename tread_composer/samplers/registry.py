"""Samplers by the names that configurations use; one of another package is ``package.module:function``."""

import inspect
from collections.abc import Mapping
from typing import Any

from tread_composer.core.named import part_named
from tread_composer.samplers.adaptive import dopri5
from tread_composer.samplers.chain import ddim, ddpm
from tread_composer.samplers.equation import Sampler
from tread_composer.samplers.ode import euler, heun
from tread_composer.samplers.stochastic import edm_heun, sde

__all__ = ['SAMPLERS', 'adaptive_settings', 'check_sampler', 'sampler_facts']

SAMPLERS: dict[str, Sampler] = {
    'ddim': ddim, 'ddpm': ddpm, 'dopri5': dopri5, 'edm_heun': edm_heun, 'euler': euler, 'heun': heun, 'sde': sde,
}  # fmt: skip


def check_sampler(name: str, objective: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse a sampler that does not exist, does not fit the objective (or its class) or does not have these settings.

    Raises:
        ValueError: Says which, and what to take instead.
    """
    sampler = part_named(name, SAMPLERS)
    attribute, does, instead = getattr(sampler, 'needs', (None, '', ''))  # set by the decorator `needs`
    if attribute is not None and not hasattr(objective, attribute):
        kind = objective if isinstance(objective, type) else type(objective)
        raise ValueError(f'{name!r} {does}, which {kind.__name__} does not have; {instead}')
    defaults = _defaults(sampler)
    foreign = sorted(set(settings or {}) - set(defaults))
    if foreign:
        raise ValueError(f'{name!r} has no settings {foreign}; it has {list(defaults) or "none"}')
    for setting, value in (settings or {}).items():
        if isinstance(value, str) and not isinstance(defaults[setting], str):
            raise ValueError(f'{setting}={value!r}: must be a number, such as {defaults[setting]!r}')


def _defaults(sampler: Sampler) -> dict[str, Any]:
    """A sampler's settings, which are its keyword-only arguments, and their defaults."""
    parameters = inspect.signature(sampler).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.kind is entry.KEYWORD_ONLY}


def adaptive_settings(name: str) -> dict[str, Any] | None:
    """The settings of a sampler that chooses its steps, and their defaults; None of one that walks a grid.

    A name that is no sampler's is refused by ``check_sampler``, and walks a grid here.
    """
    try:
        sampler = part_named(name, SAMPLERS)
    except ValueError:
        return None
    return _defaults(sampler) if getattr(sampler, 'adaptive', False) else None


def sampler_facts(name: str, objective: Any) -> dict[str, Any]:
    """What decides the samples of this objective besides the settings, for the protocol of a number.

    Numbers of before 0.2, whose last step was Euler's in flow matching too, have no ``corrected_at_zero``.
    """
    # Only where it applies: what samples as it did before has the protocol that it had.
    corrected = getattr(objective, 'drift_at_zero', False) and getattr(part_named(name, SAMPLERS), 'corrects', False)
    return {'corrected_at_zero': True} if corrected else {}
