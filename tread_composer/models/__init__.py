"""Denoisers: networks that read noisy latents, the noise level and labels. None of them knows about routing."""

from tread_composer.models.dit import DiT, DiTBlock, without_sigma
from tread_composer.models.presets import PRESETS, preset

__all__ = ['PRESETS', 'DiT', 'DiTBlock', 'preset', 'without_sigma']
