"""The tiny autoencoders of the taesd repository (github.com/madebyollin/taesd), from their pairs of weight files.

Convolutions of 64 channels and ReLUs, eightfold downsampling; latents without a variance. A file holds the encoder or
the decoder, its tensors numbered by layers. TAEF2, for the latents of FLUX.2, has in each of its three lowest blocks a
branch that normalises over the whole image, which the class of diffusers lacks; whether a file has it its names show.
Legend: B images, C channels of the latent, H x W pixels, h x w latent pixels.
"""

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tread_composer.autoencoders.pretrained import refuse_misfits

__all__ = ['TAESD', 'taesd_network', 'taesd_part']

_WIDTH = 64
_LEVELS = 4  # of resolutions; between two of them the sides halve
_BLOCKS = 3  # at each but the highest, which has one
_BOUND = 3  # the decoder squeezes latents smoothly into -3..3
_ALIKE = re.compile(r'\d+\.(conv\.\d+\.)?weight')  # of names; no other layout numbers its layers so


class _Latents(NamedTuple):
    latents: Tensor


class _Sample(NamedTuple):
    sample: Tensor


class _Squeeze(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _BOUND * torch.tanh(x / _BOUND)


class _Block(nn.Module):
    """``relu(convolutions(y) + y)``, where ``y`` is ``x``, or with a branch ``x + branch(x)``."""

    def __init__(self, has_branch: bool) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (_conv(_WIDTH, _WIDTH), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        wide = 4 * _WIDTH
        self.pool: nn.Module | None = None  # as the files call it
        if has_branch:
            self.pool = nn.Sequential(
                nn.Conv2d(_WIDTH, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(),
                nn.Conv2d(wide, _WIDTH, 1, bias=False),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(y) + y)


class TAESD(nn.Module):
    """Encoder and decoder, called like the networks of diffusers: pixels in [-1, 1].

    ``has_branch``: the blocks at the lowest resolution have the normalising branch, in encoder and decoder.
    """

    def __init__(self, latent_channels: int, has_branch: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=latent_channels, encoder_block_out_channels=(_WIDTH,) * _LEVELS)
        self.encoder = nn.Sequential(*_encoder_layers(latent_channels, has_branch[0]))
        self.decoder = nn.Sequential(*_decoder_layers(latent_channels, has_branch[1]))

    def encode(self, pixels_B3HW: Tensor) -> _Latents:
        """``[B, C, H / 8, W / 8]``. The networks themselves see pixels in [0, 1]."""
        return _Latents(self.encoder((pixels_B3HW + 1) / 2))

    def decode(self, latents_BChw: Tensor) -> _Sample:
        """``[B, 3, H, W]``."""
        return _Sample(self.decoder(latents_BChw) * 2 - 1)


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _encoder_layers(channels: int, has_branch: bool) -> Iterator[nn.Module]:
    yield _conv(3, _WIDTH)
    yield _Block(False)
    for level in range(1, _LEVELS):
        yield _conv(_WIDTH, _WIDTH, stride=2, bias=False)
        yield from (_Block(has_branch and level == _LEVELS - 1) for _ in range(_BLOCKS))
    yield _conv(_WIDTH, channels)


def _decoder_layers(channels: int, has_branch: bool) -> Iterator[nn.Module]:
    yield from (_Squeeze(), _conv(channels, _WIDTH), nn.ReLU())
    for level in range(1, _LEVELS):
        yield from (_Block(has_branch and level == 1) for _ in range(_BLOCKS))
        yield from (nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False))
    yield from (_Block(False), _conv(_WIDTH, 3))


def taesd_part(tensors: Mapping[str, Tensor]) -> str | None:
    """Whether the tensors of a file are an ``'encoder'`` or a ``'decoder'`` of this layout; None if neither."""
    if not any(_ALIKE.fullmatch(name) for name in tensors):
        return None
    return 'encoder' if '0.weight' in tensors else 'decoder'  # the first layer of a decoder has no weights


def taesd_network(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], path: str) -> TAESD:
    """The network of the tensors of two files; ``path`` names them in a refusal.

    Raises:
        UserError: A tensor is missing, left over or of another shape than the layout asks for; names it.
    """
    held = {f'encoder.{name}': value for name, value in encoder.items()}
    held |= {f'decoder.{name}': value for name, value in decoder.items()}
    encoder_head, decoder_stem = held.get('encoder.14.weight'), held.get('decoder.1.weight')
    channels = [
        value.shape[axis]
        for value, axis in ((encoder_head, 0), (decoder_stem, 1))
        if value is not None and value.ndim == 4
    ]
    branches = tuple(any(name.startswith(part) and '.pool.' in name for name in held) for part in ('enc', 'dec'))
    with torch.device('meta'):  # the weights are in memory already
        network = TAESD(channels[0] if channels else 4, branches)  # type: ignore[arg-type]
    fault = (
        f'autoencoder {path!r}: encoder and decoder of the taesd repository with eightfold downsampling are read '
        f'(taesd, taesdxl, taesd3, taef1, taef2), and this is none'
    )
    refuse_misfits(held, {name: value.shape for name, value in network.state_dict().items()}, fault)
    network.load_state_dict({name: value.float() for name, value in held.items()}, strict=True, assign=True)
    # Nothing but convolutions: on a CPU 1.3 times as fast in this order, in bfloat16 2.9 times (docs/lab_notes.md).
    return network.to(memory_format=torch.channels_last)
