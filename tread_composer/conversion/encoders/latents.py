"""Images through a network whose latents have no variance, and what every encoder with a network shares.

Legend: B images, C channels of the latent, S that are stored, R resolution, h x w latent pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tread_composer.autoencoders import Pretrained, published_scaling
from tread_composer.conversion.encoding import ImageEncoder
from tread_composer.conversion.settings import ImageSettings
from tread_composer.core.errors import UserError

__all__ = ['LatentEncoder', 'NetworkEncoder']


class NetworkEncoder(ImageEncoder):
    """Of an autoencoder; ``store`` says what is kept of its output."""

    _DTYPES: ClassVar = {'fp32': torch.float32, 'bf16': torch.bfloat16}

    def __init__(self, settings: ImageSettings, device: torch.device, network: Pretrained, store: str) -> None:
        path, name = Path(network.path).resolve(), network.path
        if path.exists():
            name = path.stem if path.is_file() else path.name
        self.network, self.autoencoder, self.autoencoder_hash = network, settings.vae_id or name, network.weight_hash()
        self.published = published_scaling(network.weight_file())
        self.title = f'{self.autoencoder} ({store}, {settings.precision})'
        super().__init__(settings, device, network.channels, network.downsampling)
        self.content |= {'store': store, 'precision': settings.precision}

    def encoded(self, pixels_B3RR: Tensor) -> Tensor:
        """What the network gives, float32."""
        return self.network.encode(pixels_B3RR, dtype=self._DTYPES[self.settings.precision])


class LatentEncoder(NetworkEncoder):
    """The latents themselves: AutoencoderTiny, AutoencoderDC, the taesd repository."""

    kind = 'samples'

    def __init__(self, settings: ImageSettings, device: torch.device, network: Pretrained) -> None:
        if settings.store is not None:
            raise UserError(
                f'--store {settings.store}: latents of {network.path} have no variance to draw from; leave --store out'
            )
        super().__init__(settings, device, network, 'latents')

    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """``[B, C, h, w]``."""
        del purpose, positions
        return self.encoded(pixels_B3RR)
