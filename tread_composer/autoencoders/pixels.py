"""The autoencoder that does nothing, for training on pixels, and the one rule from float pixels to bytes.

Legend: B images, C channels, H x W pixels.
"""

import torch
from torch import Tensor

__all__ = ['Pixels', 'to_uint8']


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
    """Pixels in [-1, 1] to bytes: ``round((x + 1) * 127.5)`` in float32, ties to even, clamped to 0..255.

    Every image and every metric goes through here, because the rounding rule moves FID. Rounding makes
    byte -> ``byte / 127.5 - 1`` -> byte the identity; truncation would not.

    Args:
        pixels: Any shape, any floating type.

    Raises:
        ValueError: Not floating point, or a NaN among the pixels (which has no byte).
    """
    if not pixels.is_floating_point():
        raise ValueError(f'pixels of type {pixels.dtype} cannot be in [-1, 1]; pass floating point')
    if bool(pixels.isnan().any()):
        raise ValueError('pixels contain NaN, which has no byte: the model or the sampler has diverged')
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
