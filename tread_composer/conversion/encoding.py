"""Samples of a source to the numbers that are stored: for images the autoencoder, both views, half precision.

Legend: B samples, C channels of the latent (S stored channels: 2C for moments), R resolution, h x w latent pixels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tread_composer.autoencoders import KL, open_autoencoder, sample_moments
from tread_composer.conversion.images import decode_image
from tread_composer.conversion.settings import ImageSettings
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.columns import Kind, columns

__all__ = ['LOGVAR_RANGE', 'Encoded', 'Encoder', 'ImageEncoder']

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clamps to the same; other autoencoders might not
_DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
_PIXEL_CHANNELS = 3


Encoded = Callable[[], list[np.ndarray]]
"""Waits for results on their way from the device: float16 ``[B, S, h, w]`` of the images, then of their mirror images
if they are wanted."""


class Encoder:
    """What stands between a source and shards, and what the manifest says about it.

    Attributes:
        device: Where to compute.
        kind: What the manifest calls the stored numbers.
        latent_shape: ``(C, h, w)``.
        mirrored: Whether the mirror images are stored, too.
        content: What decides about the stored bytes: compared when a conversion is continued.
        description: One line for the log.
        note: What the manifest adds to the source's description.
        resolution, crop, autoencoder, autoencoder_hash: As in the manifest.
        prepare: A sample as the source reads it -> an array of ``prepared_bytes``; runs in worker processes.
    """

    device: torch.device
    kind: Kind
    latent_shape: tuple[int, int, int]
    mirrored: bool
    content: dict[str, Any]
    description: str
    note = ''
    resolution: int
    crop: Any = 'center'
    autoencoder: str | None = None
    autoencoder_hash: str | None = None
    prepare: Callable[[Any], np.ndarray]
    prepared_bytes: int

    @property
    def columns(self) -> dict[str, str]:
        """Names and encodings of a row, as the shards' writer wants them."""
        return columns(self.kind, self.latent_shape, self.mirrored)

    def __call__(self, samples: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode what was prepared.

        Args:
            samples: ``[B, ...]``.
            split: Name of the split.
            positions: In the split's source.
        """
        raise NotImplementedError


class ImageEncoder(Encoder):
    """Encodes images and their mirror images: ``encode(flip(x))``, which is not ``flip(encode(x))``.

    Args:
        settings: The conversion.
        device: Where to compute.

    Raises:
        UserError: No autoencoder there, or one that cannot divide the resolution.
    """

    def __init__(self, settings: ImageSettings, device: torch.device) -> None:
        self.device, self.kind, self.mirrored = device, settings.kind, settings.mirror
        self.resolution, self.autoencoder = settings.resolution, settings.autoencoder_id
        self.prepare = functools.partial(decode_image, resolution=settings.resolution)
        self.prepared_bytes = _PIXEL_CHANNELS * settings.resolution**2
        self._store, self._seed, self._dtype = settings.store, settings.seed, _DTYPES[settings.precision]
        self._network: KL | None = None
        side, channels = settings.resolution, _PIXEL_CHANNELS
        if settings.vae is not None:
            self._network = network = open_autoencoder(
                settings.vae, subfolder=settings.vae_subfolder, revision=settings.vae_revision
            )
            channels, self.autoencoder_hash = network.channels, network.weight_hash()
            if settings.resolution % network.downsampling:
                raise UserError(
                    f'--resolution {settings.resolution} is no multiple of {network.downsampling}, the downsampling '
                    f'of {settings.vae}'
                )
            side //= network.downsampling
        self.latent_shape = (channels, side, side)
        self.content = {
            'resolution': settings.resolution,
            'crop': self.crop,
            'store': 'pixels' if settings.vae is None else settings.store,
            'mirrored': settings.mirror,
            'autoencoder': self.autoencoder,
            'autoencoder_hash': self.autoencoder_hash,
            'latent_shape': list(self.latent_shape),
            'precision': None if settings.vae is None else settings.precision,
        }
        stored = 'pixels' if settings.vae is None else f'{self.autoencoder} ({settings.store}, {settings.precision})'
        mirror = 'and of its mirror image' if settings.mirror else 'without mirror images'
        self.description = (
            f'{stored}: {channels} x {side} x {side} for each image {mirror}, '
            f'from {settings.resolution} x {settings.resolution} pixels'
        )
        notes = {'mean': '; posterior means', 'sample': f'; one draw of the posterior each, seed {settings.seed}'}
        self.note = notes.get(settings.store, '')

    def __call__(self, images_B3RR: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode uint8 images; split and positions are the keys of the draws of ``store='sample'``."""
        # Bytes travel to the device, not floats: a quarter of the traffic, and the arithmetic is done there.
        pixels = images_B3RR.to(self.device, non_blocking=True).float() / 127.5 - 1
        views = {'image': pixels, **({'mirror': pixels.flip(-1)} if self.mirrored else {})}
        stored = [
            self._stored(view, f'{split}/{name}', positions).half().to('cpu', non_blocking=True)
            for name, view in views.items()
        ]
        # The main process goes on to the next batch at once; whoever reads these waits for the event.
        arrived = torch.cuda.Event() if self.device.type == 'cuda' else None
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(self.device))

        def arrays() -> list[np.ndarray]:
            if arrived is not None:
                arrived.synchronize()
            return [view.numpy() for view in stored]

        return arrays

    def _stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        if self._network is None:
            return pixels_B3RR
        mean, logvar = self._network.encode(pixels_B3RR, dtype=self._dtype).chunk(2, dim=1)
        moments = torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)
        if self._store == 'moments':
            return moments
        if self._store == 'mean':
            return mean
        # Keyed by the image, so that the draw depends on neither ranks nor batches.
        random = KeyedRandom(self._seed, 0, positions)
        noise = random.normal(f'conversion/{purpose}', *self.latent_shape)
        return sample_moments(moments, noise.to(moments.device))
