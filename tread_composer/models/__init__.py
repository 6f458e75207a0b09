"""Denoisers: networks that read noisy latents, the noise level and labels. None of them knows about routing."""

from tread_composer.models.base import LatentTransformer
from tread_composer.models.dit import DiT, DiTBlock, without_sigma
from tread_composer.models.lightning_dit import LightningDiT
from tread_composer.models.mamba2_dit import Mamba2DiT

__all__ = [
    'BACKBONES',
    'PRESETS',
    'DiT',
    'DiTBlock',
    'LatentTransformer',
    'LightningDiT',
    'Mamba2DiT',
    'preset',
    'without_sigma',
]

BACKBONES: dict[str, type[LatentTransformer]] = {
    'dit': DiT,
    'lightning_dit': LightningDiT,
    'mamba2_dit': Mamba2DiT,
}
"""By the name of their section in a configuration, ``model.name``."""

PRESETS = {name: sizes for backbone in BACKBONES.values() for name, sizes in getattr(backbone, 'presets', {}).items()}
"""The named sizes of all backbones, as constructor arguments."""


def preset(name: str) -> dict[str, int]:
    """Constructor arguments of the backbone that has this named size, such as ``'DiT-XL/2'`` (a fresh dict).

    Raises:
        ValueError: No backbone has a size of this name.
    """
    if name not in PRESETS:
        raise ValueError(f'unknown preset {name!r}; choose one of {", ".join(PRESETS)}')
    return dict(PRESETS[name])
