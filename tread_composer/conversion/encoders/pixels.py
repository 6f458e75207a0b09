"""Images as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tread_composer.conversion.encoding import ImageEncoder
from tread_composer.conversion.settings import ImageSettings

__all__ = ['PixelEncoder']


class PixelEncoder(ImageEncoder):
    """Pixels as they are."""

    kind, title = 'pixels', 'pixels'

    def __init__(self, settings: ImageSettings, device: torch.device) -> None:
        super().__init__(settings, device, channels=3)
        self.content |= {'store': 'pixels', 'precision': None}

    def stored(self, pixels_B3RR: Tensor, purpose: str, positions: Sequence[int]) -> Tensor:
        """The pixels."""
        del purpose, positions
        return pixels_B3RR
