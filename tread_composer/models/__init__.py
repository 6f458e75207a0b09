"""Denoisers: networks that read noisy latents, the noise level and labels. None of them knows about routing."""

from tread_composer.models.base import LatentTransformer
from tread_composer.models.dit import DiT, DiTBlock, without_sigma
from tread_composer.models.lightning_dit import LightningDiT
from tread_composer.models.mamba2_dit import Mamba2DiT

__all__ = ['BACKBONES', 'DiT', 'DiTBlock', 'LatentTransformer', 'LightningDiT', 'Mamba2DiT', 'without_sigma']

BACKBONES: dict[str, type[LatentTransformer]] = {
    'dit': DiT,
    'lightning_dit': LightningDiT,
    'mamba2_dit': Mamba2DiT,
}
"""By the name of their section in a configuration, ``model.name``."""
