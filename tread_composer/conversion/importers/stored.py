"""Other people's latents as a source of the converter: raw again, in half precision, nothing else changed.

Legend: B samples, V views (the image, its mirror image), C latent channels, K stored channels (2C for moments), H x W
latent pixels.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from tread_composer.autoencoders import open_autoencoder, published_scaling
from tread_composer.conversion.contents import LOGVAR_RANGE
from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.importers.layouts import open_layout
from tread_composer.conversion.settings import ImportSettings
from tread_composer.conversion.sources.source import Source
from tread_composer.conversion.squares import Sample
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import read_class_names

__all__ = ['StoredLatents']


class StoredLatents(Encoder):
    """Latents that are only put into our form: ``raw = stored / scale + shift``; they must be as the settings say."""

    def __init__(self, settings: ImportSettings, device: torch.device) -> None:
        assert settings.resolution is not None  # the settings have asked for it
        self.device, self.split = device, settings.split
        # MaskDiT and REPA keep what the encoder gives, the others draws from it.
        keeps_moments = settings.layout.startswith(('maskdit', 'repa'))
        self.kind = settings.kind or ('moments' if keeps_moments else 'samples')
        self.resolution, self.crop = settings.resolution, settings.crop
        self.autoencoder, self.autoencoder_hash = settings.autoencoder_id, settings.autoencoder_hash
        channels, downsampling = settings.channels, None
        if settings.autoencoder:
            network = open_autoencoder(settings.autoencoder)
            channels, downsampling = network.channels, network.downsampling
            self.autoencoder_hash = network.weight_hash()
            self.published = published_scaling(network.weight_file())
            if self.kind == 'moments' and not network.is_variational:
                raise UserError(f'--autoencoder {settings.autoencoder}: its latents have no variance, so no moments')
            if settings.channels not in (None, channels):
                raise UserError(f'--channels {settings.channels}: the autoencoder has {channels}')
        factor = 2 if self.kind == 'moments' else 1
        self.source = open_layout(settings, None if channels is None else channels * factor)
        self.source.description = f'imported: {self.source.description}'
        self._set_labels(settings)
        try:
            views = self.source.read(0)
        except UserError as error:
            raise UserError(f'{self.source.names[0]}: cannot be read: {error}') from error
        self._stored, self.mirrored = views[0].shape, len(views) == 2
        self.latent_shape = self._latent_shape(channels, downsampling)
        self._scale_C11, self._shift_C11 = settings.scale_and_shift(self.latent_shape[0])
        self.prepare = self._raw_views
        self.particulars = {
            'layout': settings.layout,
            'kind': self.kind,
            'stored_scale': self._scale_C11.flatten().tolist(),
            'stored_shift': self._shift_C11.flatten().tolist(),
        }
        shape = ' x '.join(str(size) for size in self.latent_shape)
        mirror = ', with mirror images' if self.mirrored else ''
        self.description = f'latents of {self.autoencoder} ({self.kind}): {shape}{mirror}'

    def _set_labels(self, settings: ImportSettings) -> None:
        source, classes = self.source, tuple(str(label) for label in range(settings.num_classes or 0))
        if settings.class_names is not None:
            classes = read_class_names(Path(settings.class_names))
            if settings.num_classes not in (None, len(classes)):
                raise UserError(
                    f'--num-classes {settings.num_classes}: {settings.class_names} has {len(classes)} names'
                )
        source.class_names = classes
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(classes)))
        if not classes:
            source.description += '; no classes: the labels of the source are left out'
            source.labels = np.zeros_like(source.labels)
        elif len(wrong):
            raise UserError(
                f'{source.names[wrong[0]]}: label {source.labels[wrong[0]]} with {len(classes)} classes (0..'
                f'{len(classes) - 1}), and {len(wrong) - 1} more like it; is --num-classes right?'
            )

    def _latent_shape(self, channels: int | None, downsampling: int | None) -> tuple[int, int, int]:
        """That of the first sample, compared with what is said about all of them."""
        stored, per_channel = self._stored, 2 if self.kind == 'moments' else 1
        if len(stored) != 3 or stored[0] % per_channel:
            raise UserError(
                f'{self.source.names[0]}: shape {stored} cannot be channels, height, width of {self.kind}; is --kind '
                f'right?'
            )
        shape = (stored[0] // per_channel, stored[1], stored[2])
        if channels not in (None, shape[0]):
            raise UserError(
                f'{self.source.names[0]}: shape {stored} as {self.kind} means {shape[0]} channels, {channels} are '
                f'stated; is --kind right (moments are twice as many)?'
            )
        if downsampling is not None and any(side * downsampling != self.resolution for side in shape[1:]):
            raise UserError(
                f'{self.source.names[0]}: {shape[1]} x {shape[2]} latent pixels are {shape[1] * downsampling} pixels a '
                f'side with this autoencoder; --resolution {self.resolution} is not that'
            )
        return shape

    def _raw_views(self, views: list[np.ndarray]) -> Sample:
        """Raw latents, float16 ``[V, K, H, W]``."""
        for array in views:
            if array.shape != self._stored or array.dtype.kind != 'f':
                raise UserError(
                    f'{array.dtype} values of shape {array.shape}, the first sample has floats of shape {self._stored}'
                )
        stored_VKHW = np.stack(views).astype(np.float32)
        channels = self.latent_shape[0]
        raw_VKHW = stored_VKHW[:, :channels] / self._scale_C11 + self._shift_C11
        if self.kind == 'moments':
            # a log-variance moves by the logarithm of the squared scale
            logvar = stored_VKHW[:, channels:] - 2 * np.log(np.abs(self._scale_C11))
            raw_VKHW = np.concatenate([raw_VKHW, logvar.clip(*LOGVAR_RANGE)], axis=1)
        with np.errstate(over='ignore'):  # whoever writes them refuses what is not finite
            return Sample(raw_VKHW.astype(np.float16))

    def sources(self, scratch: Path) -> Mapping[str, Source]:
        """The one split."""
        del scratch
        return {self.split: self.source}
