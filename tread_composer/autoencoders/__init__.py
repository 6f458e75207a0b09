"""Pixels in [-1, 1] <-> raw latents. The only package of this project that knows diffusers."""

from tread_composer.autoencoders.kl import KL
from tread_composer.autoencoders.moments import sample_moments
from tread_composer.autoencoders.pixels import Pixels, to_uint8

__all__ = ['KL', 'Pixels', 'sample_moments', 'to_uint8']
