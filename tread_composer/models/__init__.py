"""Denoisers: networks that read noisy latents, the noise level and labels. None of them knows about routing."""

from tread_composer.models.dit import DiT, DiTBlock, without_sigma
from tread_composer.models.lightning_dit import LightningDiT
from tread_composer.models.mamba2_dit import Mamba2DiT
from tread_composer.models.presets import LIGHTNING_DIT_PRESETS, MAMBA2_DIT_PRESETS, PRESETS, preset

__all__ = [
    'BACKBONES',
    'LIGHTNING_DIT_PRESETS',
    'MAMBA2_DIT_PRESETS',
    'PRESETS',
    'Backbone',
    'DiT',
    'DiTBlock',
    'LightningDiT',
    'Mamba2DiT',
    'preset',
    'without_sigma',
]

Backbone = DiT | LightningDiT | Mamba2DiT
"""A network that a configuration can name. Each has ``blocks``, ``depth``, ``num_tokens`` and ``token_arguments``."""

BACKBONES: dict[str, type[Backbone]] = {'dit': DiT, 'lightning_dit': LightningDiT, 'mamba2_dit': Mamba2DiT}
"""By the name of their section in a configuration, ``model.name``."""
