"""Samples of a source to the numbers that are stored: for images both views, in half precision.

Legend: B samples, C channels of the latent (S stored channels: 2C for moments), R resolution, h x w latent pixels.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tread_composer.autoencoders import Pretrained, Published, open_autoencoder, published_scaling, sample_moments
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.detect import open_sources
from tread_composer.conversion.sources.source import Source
from tread_composer.conversion.squares import Sample, read_image
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.columns import Kind, columns, stored_shape

__all__ = ['Encoded', 'Encoder', 'ImageEncoder', 'NetworkEncoder', 'image_encoder']

Encoded = Callable[[], list[np.ndarray]]
"""Waits for results on their way from the device: float16 ``[B, S, h, w]`` of the images, then of their mirror images
if they are wanted."""


class Encoder(ABC):
    """What stands between a source and shards, and what the manifest says about it."""

    device: torch.device
    prepare: Callable[[Any], Sample]  # of a sample as the source reads it; runs in worker processes
    latent_shape: tuple[int, int, int]  # (C, h, w)
    description: str  # one line for the log
    note = ''  # what the manifest adds to the source's description
    particulars: dict[str, Any]  # what decides about the stored bytes besides ``facts``
    # As in the manifest:
    kind: Kind
    mirrored: bool
    resolution: int
    crop: Any = 'center'
    autoencoder: str | None = None
    autoencoder_hash: str | None = None
    background: str | None = None  # what transparent images stand on
    published: Published | None = None  # scale and shift, if some are

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says and ``content`` compares."""
        names = ('resolution', 'crop', 'mirrored', 'autoencoder', 'autoencoder_hash')
        return {name: getattr(self, name) for name in names}

    @property
    def content(self) -> dict[str, Any]:
        """What decides about the stored bytes: compared when a conversion is continued."""
        return {**self.facts, 'latent_shape': list(self.latent_shape), **self.particulars}

    @property
    def columns(self) -> dict[str, str]:
        """Names and encodings of a row, as the shards' writer wants them."""
        return columns(self.kind, self.latent_shape, self.mirrored)

    @property
    def prepared_bytes(self) -> int:
        """Of one prepared sample, at the most: here its latents and those of its mirror image, float16."""
        return 2 * 2 * math.prod(stored_shape(self.kind, self.latent_shape))

    @abstractmethod
    def sources(self, scratch: Path) -> Mapping[str, Source]:
        """What is encoded: the source of each split; ``scratch`` is for copies that are removed at the end."""

    def __call__(self, samples: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode what was prepared, ``[B, ...]``, of these positions in the split's source.

        Here that is ``[B, V, S, h, w]`` for V views, of which nothing is left to be done.
        """
        return lambda: [view.numpy() for view in samples.unbind(1)]


class ImageEncoder(Encoder):
    """Stores images and their mirror images: as pixels, or as a subclass encodes them.

    The mirror image is ``encode(flip(x))``, which is not ``flip(encode(x))``. A subclass sets the attributes, calls
    this with the latent's channels and the pixels per latent pixel along a side, of which the resolution must be a
    multiple, and says what is stored of pixels in ``stored``.
    """

    kind, title, store, precision = 'pixels', 'pixels', 'pixels', None

    def __init__(self, settings: ImageSettings, device: torch.device, channels: int = 3, downsampling: int = 1) -> None:
        self.settings, self.device, self.mirrored = settings, device, settings.mirror
        self.resolution, side = settings.resolution, settings.resolution // downsampling
        if settings.resolution % downsampling:
            raise UserError(
                f'--resolution {settings.resolution} is no multiple of {downsampling}, the downsampling of '
                f'{settings.vae}'
            )
        self.background, colour = settings.background, settings.background_colour
        # No method: a worker gets what it needs, and not the network.
        self.prepare = functools.partial(read_image, resolution=self.resolution, background=colour)
        self.latent_shape = (channels, side, side)
        self.particulars = {'store': self.store, 'precision': self.precision, 'background': self.background}
        mirror = 'and of its mirror image' if settings.mirror else 'without mirror images'
        self.description = (
            f'{self.title}: {channels} x {side} x {side} for each image {mirror}, '
            f'from {settings.resolution} x {settings.resolution} pixels'
        )

    @property
    def prepared_bytes(self) -> int:
        """Of one decoded image."""
        return 3 * self.resolution**2

    def sources(self, scratch: Path) -> Mapping[str, Source]:
        """The images at ``settings.source``."""
        return open_sources(self.settings, scratch)

    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """What is stored of pixels in [-1, 1]: ``[B, S, h, w]``; purpose and positions are the keys of random draws."""
        del purpose, positions
        return pixels_B3RR

    def __call__(self, images_B3RR: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode uint8 images."""
        # Bytes travel to the device, not floats: a quarter of the traffic, and the arithmetic is done there.
        pixels = images_B3RR.to(self.device, non_blocking=True).float() / 127.5 - 1
        views = {'image': pixels, **({'mirror': pixels.flip(-1)} if self.mirrored else {})}
        stored = [
            self.stored(view, f'{split}/{name}', positions).half().to('cpu', non_blocking=True)
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


class NetworkEncoder(ImageEncoder):
    """Through an autoencoder: its latents, or of a variational one moments, or the mean or one draw of each."""

    def __init__(self, settings: ImageSettings, device: torch.device, network: Pretrained) -> None:
        if settings.store is not None and not network.is_variational:
            raise UserError(
                f'--store {settings.store}: latents of {network.path} have no variance to draw from; leave --store out'
            )
        self.store, self.precision = settings.store or 'moments', settings.precision
        if not network.is_variational:
            self.store = 'latents'
        self.kind = 'moments' if self.store == 'moments' else 'samples'
        notes = {'mean': '; posterior means', 'sample': f'; one draw of the posterior each, seed {settings.seed}'}
        self.note = notes.get(self.store, '')
        path, name = Path(network.path).resolve(), network.path
        if path.exists():
            name = path.stem if path.is_file() else path.name
        self.network, self.autoencoder, self.autoencoder_hash = network, settings.vae_id or name, network.weight_hash()
        self.published = published_scaling(network.weight_file())
        self.title = f'{self.autoencoder} ({self.store}, {self.precision})'
        super().__init__(settings, device, network.channels, network.downsampling)

    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """``[B, 2C, h, w]`` for moments, else ``[B, C, h, w]``."""
        dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16}[self.precision]
        latents = self.network.encode(pixels_B3RR, dtype=dtype)
        if self.store in ('latents', 'moments'):
            return latents
        if self.store == 'mean':
            return latents.chunk(2, dim=1)[0]
        # Keyed by the image, so that the draw depends on neither ranks nor batches.
        noise = KeyedRandom(self.settings.seed, 0, positions).normal(f'conversion/{purpose}', *self.latent_shape)
        return sample_moments(latents, noise.to(latents.device))


def image_encoder(settings: ImageSettings, device: torch.device) -> ImageEncoder:
    """The encoder that the settings ask for."""
    if settings.vae is None:
        return ImageEncoder(settings, device)
    network = open_autoencoder(settings.vae, subfolder=settings.vae_subfolder, revision=settings.vae_revision)
    return NetworkEncoder(settings, device, network)
