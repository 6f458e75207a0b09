"""Samples of a source to the numbers that are stored: for images both views, in half precision.

Which network encodes them, a class in ``encoders/`` knows.
Legend: B samples, C channels of the latent (S stored channels: 2C for moments), R resolution, h x w latent pixels.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tread_composer.autoencoders import Published
from tread_composer.conversion.images import Colour, read_image
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.base import Source
from tread_composer.conversion.sources.detect import open_sources
from tread_composer.core.errors import UserError
from tread_composer.data.columns import Kind, columns, stored_shape

__all__ = ['Encoded', 'Encoder', 'ImageEncoder', 'Sample']

Encoded = Callable[[], list[np.ndarray]]
"""Waits for results on their way from the device: float16 ``[B, S, h, w]`` of the images, then of their mirror images
if they are wanted."""


class Sample(NamedTuple):
    """What a worker prepares of a sample for the encoder."""

    values: np.ndarray
    is_transparent: bool = False


class Encoder(ABC):
    """What stands between a source and shards, and what the manifest says about it."""

    device: torch.device
    prepare: Callable[[Any], Sample]  # of a sample as the source reads it; runs in worker processes
    latent_shape: tuple[int, int, int]  # (C, h, w)
    content: dict[str, Any]  # what decides about the stored bytes: compared when a conversion is continued
    description: str  # one line for the log
    note = ''  # what the manifest adds to the source's description
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

    @abstractmethod
    def __call__(self, samples: Tensor, split: str, positions: Sequence[int]) -> Encoded:
        """Encode what was prepared, ``[B, ...]``, of these positions in the split's source."""


def _square(data: bytes, resolution: int, background: Colour | None) -> Sample:
    return Sample(*read_image(data, resolution, background))


class ImageEncoder(Encoder):
    """Encodes images and their mirror images: ``encode(flip(x))``, which is not ``flip(encode(x))``.

    Which network that is, a subclass knows: it says ``kind``, ``title`` and the autoencoder before it calls this with
    the latent's channels and the pixels per latent pixel along a side, of which the resolution must be a multiple, and
    what is stored of pixels in ``stored``.
    """

    title: str

    def __init__(self, settings: ImageSettings, device: torch.device, channels: int, downsampling: int = 1) -> None:
        self.settings, self.device, self.mirrored = settings, device, settings.mirror
        self.resolution, side = settings.resolution, settings.resolution // downsampling
        if settings.resolution % downsampling:
            raise UserError(
                f'--resolution {settings.resolution} is no multiple of {downsampling}, the downsampling of '
                f'{settings.vae}'
            )
        self.background = settings.background
        # No method: a worker gets what it needs, and not the network.
        self.prepare = functools.partial(_square, resolution=self.resolution, background=settings.background_colour)
        self.latent_shape = (channels, side, side)
        self.content = {**self.facts, 'latent_shape': list(self.latent_shape)}
        # Left out at what conversions did that were begun before there was a choice: they can still be continued.
        self.content |= {} if settings.background_colour is None else {'background': settings.background}
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
        truth, names = (
            None if path is None else Path(path).expanduser()
            for path in (self.settings.ground_truth, self.settings.class_names)
        )
        settings = self.settings
        return open_sources(
            Path(settings.source).expanduser(),
            scratch=scratch,
            ground_truth=truth,
            class_names=names,
            image_column=settings.image_column,
            label_column=settings.label_column,
            use_test=not settings.held_out and 'val' in (settings.splits or ('val',)),
        )

    @abstractmethod
    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """What is stored of pixels in [-1, 1]: ``[B, S, h, w]``; purpose and positions are the keys of random draws."""

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
