"""Decoded images to the numbers that are stored: the autoencoder, both views, half precision.

Legend: B images, C channels of the latent (S stored channels: 2C for moments), R resolution, h x w latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tread_composer.autoencoders import KL, open_autoencoder, sample_moments
from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.columns import columns, stored_shape

__all__ = ['Encoded', 'Encoder']

_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clamps to the same; other autoencoders might not
_DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
_PIXEL_CHANNELS = 3


@dataclass(frozen=True)
class Encoded:
    """Results on their way from the device.

    Args:
        views: float16 ``[B, S, h, w]`` on the CPU: of the images, then of their mirror images if they are wanted.
        arrived: On a GPU, what tells that the copy is complete; before that ``views`` hold rubbish.
    """

    views: list[Tensor]
    arrived: Any = None

    def arrays(self) -> list[np.ndarray]:
        """The views as arrays; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [view.numpy() for view in self.views]


class Encoder:
    """What stands between decoded images and shards.

    Args:
        settings: Of the conversion.
        device: Where to compute.

    Raises:
        UserError: No autoencoder there, or one that cannot divide the resolution.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self._settings = settings
        self._autoencoder: KL | None = None
        side, channels, self._hash = settings.resolution, _PIXEL_CHANNELS, None
        if settings.vae is not None:
            self._autoencoder = autoencoder = open_autoencoder(
                settings.vae, subfolder=settings.vae_subfolder, revision=settings.vae_revision
            )
            channels, self._hash = autoencoder.channels, autoencoder.weight_hash()
            if settings.resolution % autoencoder.downsampling:
                raise UserError(
                    f'--resolution {settings.resolution} is no multiple of {autoencoder.downsampling}, the '
                    f'downsampling of {settings.vae}'
                )
            side //= autoencoder.downsampling
        self.latent_shape = (channels, side, side)

    def content(self) -> dict[str, Any]:
        """What decides about the stored bytes, besides the images: compared when a conversion is continued."""
        settings = self._settings
        return {
            'resolution': settings.resolution,
            'crop': 'center',
            'store': 'pixels' if settings.vae is None else settings.store,
            'mirrored': settings.mirror,
            'autoencoder': settings.autoencoder_id,
            'autoencoder_hash': self._hash,
            'latent_shape': list(self.latent_shape),
            'precision': None if settings.vae is None else settings.precision,
            'seed': settings.seed,
            'held_out': settings.held_out,
            'part_size': settings.part_size,
            'compression': settings.compression,
        }

    @property
    def columns(self) -> dict[str, str]:
        """Names and encodings of a row, as the shards' writer wants them."""
        return columns(self._settings.kind, self.latent_shape, self._settings.mirror)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """``(S, h, w)``."""
        return stored_shape(self._settings.kind, self.latent_shape)

    def __call__(self, images_B3RR: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode the images, and their mirror images: ``encode(flip(x))``, which is not ``flip(encode(x))``.

        Args:
            images_B3RR: uint8.
            split: Name of the split, for the draws of ``store='sample'``.
            positions: In the split's source, likewise.
        """
        # Bytes travel to the device, not floats: a quarter of the traffic, and the arithmetic is done there.
        pixels = images_B3RR.to(self.device, non_blocking=True).float() / 127.5 - 1
        flipped = [pixels.flip(-1)] if self._settings.mirror else []
        views = [
            self._stored(view, f'{split}/{name}', positions).half().to('cpu', non_blocking=True)
            for view, name in zip([pixels, *flipped], ('image', 'mirror'), strict=False)
        ]
        if self.device.type != 'cuda':
            return Encoded(views)
        # The main process goes on to the next batch at once; whoever reads these waits for the event.
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))
        return Encoded(views, arrived)

    def _stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        if self._autoencoder is None:
            return pixels_B3RR
        moments = self._autoencoder.encode(pixels_B3RR, dtype=_DTYPES[self._settings.precision])
        mean, logvar = moments.chunk(2, dim=1)
        moments = torch.cat([mean, logvar.clamp(*_LOGVAR_RANGE)], dim=1)
        if self._settings.store == 'moments':
            return moments
        if self._settings.store == 'mean':
            return mean
        # Keyed by the image, so that the draw depends on neither ranks nor batches.
        random = KeyedRandom(self._settings.seed, 0, positions)
        noise = random.normal(f'conversion/{purpose}', *self.latent_shape)
        return sample_moments(moments, noise.to(moments.device))
