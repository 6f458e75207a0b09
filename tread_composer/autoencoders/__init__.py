"""Pixels in [-1, 1] <-> raw latents. The only package of this project that knows diffusers."""

from tread_composer.autoencoders.kl import KL, sample_moments
from tread_composer.autoencoders.ldm import LDM, open_autoencoder
from tread_composer.autoencoders.pixels import Pixels, to_tiles, to_uint8

__all__ = ['AUTOENCODERS', 'KL', 'LDM', 'Pixels', 'open_autoencoder', 'sample_moments', 'to_tiles', 'to_uint8']

AUTOENCODERS = {'pixels': Pixels, 'kl': open_autoencoder}
"""By the name that configurations use, ``autoencoder.name``."""
