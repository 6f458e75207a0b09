"""Guidance: where the weak prediction comes from that sampling guides away from (``provider.GuidanceProvider``).

A new kind is a file here and a line in ``GUIDANCE``; one of another package is named ``package.module:Class``.
"""

import inspect
from collections.abc import Callable
from typing import Any

from tread_composer.core.named import part_named
from tread_composer.samplers.guidance.auto import Autoguidance
from tread_composer.samplers.guidance.classifier_free import ClassifierFree
from tread_composer.samplers.guidance.provider import GuidanceProvider
from tread_composer.samplers.guidance.sparse import SparseGuidance

__all__ = ['GUIDANCE', 'default_guidance', 'guidance_defaults', 'guidance_named']

GUIDANCE: dict[str, Callable[..., GuidanceProvider]] = {
    'classifier_free': ClassifierFree,
    'sparse': SparseGuidance,
    'auto': Autoguidance,
}
"""By the name that settings use; ``'none'`` beside them is no guidance."""


def guidance_named(name: str) -> Callable[..., GuidanceProvider]:
    """The provider's class.

    Raises:
        ValueError: There is none of this name.
    """
    try:
        return part_named(name, {'none': None, **GUIDANCE})  # 'none' is among the choices that a refusal lists
    except ValueError as error:
        raise ValueError(f'guidance: {error}') from None


def guidance_defaults(name: str) -> dict[str, Any]:
    """The settings of a kind of guidance and their defaults.

    Raises:
        ValueError: There is none of this name.
    """
    if name == 'none':
        return {}
    parameters = inspect.signature(guidance_named(name)).parameters  # the constructor is the schema
    return {key: parameter.default for key, parameter in parameters.items()}


def default_guidance(guidance_scale: float | None) -> str:
    """What a bare guidance scale means."""
    return 'none' if guidance_scale in (None, 1) else 'classifier_free'
