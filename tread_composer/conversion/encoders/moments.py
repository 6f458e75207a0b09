"""Images through a variational autoencoder.

Legend: B images, C channels of the latent, R resolution, h x w latent pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tread_composer.autoencoders import Pretrained, sample_moments
from tread_composer.conversion.encoders.latents import NetworkEncoder
from tread_composer.conversion.settings import ImageSettings
from tread_composer.core.randomness import KeyedRandom

__all__ = ['MomentsEncoder']


class MomentsEncoder(NetworkEncoder):
    """Moments, or the mean or one draw of each."""

    def __init__(self, settings: ImageSettings, device: torch.device, network: Pretrained) -> None:
        self.store = settings.store or 'moments'
        self.kind = 'moments' if self.store == 'moments' else 'samples'
        notes = {'mean': '; posterior means', 'sample': f'; one draw of the posterior each, seed {settings.seed}'}
        self.note = notes.get(self.store, '')
        super().__init__(settings, device, network, self.store)

    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """``[B, 2C, h, w]`` for moments, else ``[B, C, h, w]``."""
        moments = self.encoded(pixels_B3RR)
        if self.store == 'moments':
            return moments
        if self.store == 'mean':
            return moments.chunk(2, dim=1)[0]
        # Keyed by the image, so that the draw depends on neither ranks nor batches.
        random = KeyedRandom(self.settings.seed, 0, positions)
        noise = random.normal(f'conversion/{purpose}', *self.latent_shape)
        return sample_moments(moments, noise.to(moments.device))
