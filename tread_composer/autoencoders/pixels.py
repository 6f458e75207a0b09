"""The autoencoder that does nothing, for training on pixels, and the one rule from float pixels to bytes.

Legend: B images, C channels, H x W pixels.
"""

import numpy as np
import torch
from torch import Tensor

from tread_composer.core.errors import UserError

__all__ = ['Pixels', 'to_tiles', 'to_uint8']


class Pixels:
    """Identity: the raw latents are the pixels."""

    id = 'pixels'
    """What the manifest of the data calls it."""

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """The pixels themselves."""
        return pixels_BCHW

    def decode(self, raw_latents_BCHW: Tensor) -> Tensor:
        """The raw latents themselves, not clamped: only ``to_uint8`` clamps."""
        return raw_latents_BCHW


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] of any shape to bytes: ``round((x + 1) * 127.5)`` in float32, ties to even, clamped to 0..255.

    Every image and every metric goes through here, because the rounding rule moves FID. Rounding makes
    byte -> ``byte / 127.5 - 1`` -> byte the identity; truncation would not.

    Raises:
        ValueError: Not floating point, or a NaN among the pixels (which has no byte).
    """
    if not pixels.is_floating_point():
        raise ValueError(f'pixels of type {pixels.dtype} cannot be in [-1, 1]; pass floating point')
    if bool(pixels.isnan().any()):
        raise ValueError('pixels contain NaN, which has no byte: the model or the sampler has diverged')
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_tiles(pixels_NCHW: Tensor) -> np.ndarray:
    """Colour bytes ``[N, H, W, 3]`` for a picture, of -1 to 1; what lies beyond is cut, what is not finite is grey.

    Raises:
        UserError: Neither 1 nor 3 channels.
    """
    if pixels_NCHW.shape[1] not in (1, 3):
        raise UserError(f'images of {pixels_NCHW.shape[1]} channels cannot be drawn; 1 (grey) and 3 (colour) can')
    tiles_NHWC = to_uint8(pixels_NCHW.nan_to_num(0.0, 0.0, 0.0)).permute(0, 2, 3, 1)
    return tiles_NHWC.expand(*tiles_NHWC.shape[:3], 3).numpy()
