"""Pixels in [-1, 1] <-> raw latents. The only package of this project that knows diffusers."""

from tread_composer.autoencoders.file import File, open_autoencoder
from tread_composer.autoencoders.folder import KL, Folder
from tread_composer.autoencoders.pixels import Pixels, to_tiles, to_uint8
from tread_composer.autoencoders.pretrained import Pretrained, sample_moments
from tread_composer.autoencoders.published import PUBLISHED, Published, published_scaling

__all__ = [
    'AUTOENCODERS', 'KL', 'PUBLISHED', 'File', 'Folder', 'Pixels', 'Pretrained', 'Published', 'open_autoencoder',
    'published_scaling', 'sample_moments', 'to_tiles', 'to_uint8',
]  # fmt: skip

AUTOENCODERS = {'pixels': Pixels, 'pretrained': open_autoencoder, 'kl': open_autoencoder}
"""By the name that configurations use, ``autoencoder.name``. ``kl`` is what ``pretrained`` was called when it knew
nothing else."""
