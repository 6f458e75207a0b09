"""Networks trained elsewhere that turn pixels into latents and back: frozen, float32, loaded when first needed.

Raw latents are what the network gives: no scale, no shift. Those belong to the training run (`latent_scale`,
`latent_shift`), in one place, and are never applied here.
Legend: B images, C channels of the latent, S channels that `encode` gives, H x W pixels, h x w latent pixels.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.io.tensors import digest_of

__all__ = ['NETWORKS', 'Pretrained', 'refuse_misfits', 'sample_moments']


_COLOURS = 3  # channels of every image: grey ones are converted to colour


class _Use(NamedTuple):
    """What tells one class of network from another."""

    levels: str  # key of its configuration with one number a level; each level but one halves the sides
    stored: Callable[[Any], Tensor]  # what is stored of the output of its `encode`
    is_variational: bool = False


def _moments(output: Any) -> Tensor:
    return torch.cat([output.latent_dist.mean, output.latent_dist.logvar], dim=1)


def refuse_misfits(held: Mapping[str, Tensor], expected: Mapping[str, torch.Size], fault: str) -> None:
    """A ``UserError`` that names tensors which are missing, left over or of another shape; ``fault`` begins it."""
    shapes = {name: list(value.shape) for name, value in held.items()}
    layout = {name: list(shape) for name, shape in expected.items()}
    wrong = [
        f'  {name}: {shapes.get(name, "missing")}, the rest asks for {layout.get(name, "no such tensor")}'
        for name in dict.fromkeys([*layout, *shapes])
        if shapes.get(name) != layout.get(name)
    ]
    if wrong:
        raise UserError('\n'.join([fault, *wrong[:10]]))


def sample_moments(moments_B2Chw: Tensor, noise_BChw: Tensor) -> Tensor:
    """Draws from a posterior (Kingma & Welling 2013, arXiv 1312.6114, section 2.4): float32 ``[B, C, h, w]``.

    ``mean + exp(logvar / 2) * noise``. The moments are means, then log-variances, widened before the exponential; noise
    is standard normal, and zeros give the means.

    Raises:
        ValueError: The shapes do not belong together.
    """
    batch, channels, *size = noise_BChw.shape
    if moments_B2Chw.shape != (batch, 2 * channels, *size):
        raise ValueError(
            f'moments {tuple(moments_B2Chw.shape)} and noise {tuple(noise_BChw.shape)} do not belong together: '
            f'moments hold means and log-variances, twice the channels of the noise and else its shape'
        )
    mean_BChw, logvar_BChw = moments_B2Chw.float().chunk(2, dim=1)
    return mean_BChw + torch.exp(0.5 * logvar_BChw) * noise_BChw.float()


NETWORKS = {
    'AutoencoderKL': _Use('block_out_channels', _moments, is_variational=True),
    'AutoencoderTiny': _Use('encoder_block_out_channels', lambda output: output.latents),
    'AutoencoderDC': _Use('encoder_block_out_channels', lambda output: output.latent),
    'TAESD': _Use('encoder_block_out_channels', lambda output: output.latents),
}
"""By the name of the class: three of diffusers, and ours for files of the taesd repository."""


class Pretrained(ABC):
    """A frozen autoencoder.

    It is no ``nn.Module`` on purpose: as a part of the model it would enter checkpoints, sharding and the optimizer.
    The network moves to the device of whatever it is given.

    Args:
        path: Where the weights are.

    Attributes:
        id: What the manifest of the data calls it.
        other_weights: Whether weights that are not those of the data may decode.
        expected_hash: The ``weight_hash()`` that the weights must have, for example a manifest's.

    Raises:
        UserError: On first use: it cannot be loaded, whole and without a rest, is not for colour images, or has other
            weights than ``expected_hash``.
    """

    def __init__(self, path: str) -> None:
        self.path = str(path)
        self.id, self.other_weights = self.path, False
        self.expected_hash: str | None = None
        self._network: Any = None

    @property
    def network(self) -> Any:
        """The network: frozen, evaluation mode, float32."""
        if self._network is None:
            network = self._load().requires_grad_(False).eval()
            pixels = {getattr(network.config, name, _COLOURS) for name in ('in_channels', 'out_channels')}
            if pixels != {_COLOURS}:
                counts = ', '.join(map(str, sorted(pixels)))
                raise UserError(
                    f'autoencoder {self.path!r}: made for images of {counts} channels; images have {_COLOURS} here'
                )
            digest = None if self.expected_hash is None else digest_of(network.state_dict())
            if digest != self.expected_hash:
                raise UserError(
                    f'autoencoder {self.path!r}: its weights are not those that made the latents ({digest}, '
                    f'the manifest of the data says {self.expected_hash}); name the one of the data, or set '
                    f'autoencoder.other_weights: true if only the decoder was tuned further'
                )
            self._network = network
        return self._network

    @abstractmethod
    def _load(self) -> Any:
        """A network of one of ``NETWORKS``."""

    @abstractmethod
    def weight_file(self) -> Path | None:
        """The file that its encoder's weights come from; None if it is not a file of this machine."""

    @property
    def _use(self) -> _Use:
        return NETWORKS[type(self.network).__name__]

    @property
    def is_variational(self) -> bool:
        """Whether ``encode`` gives moments (means, then log-variances) and not the latents themselves."""
        return self._use.is_variational

    @property
    def channels(self) -> int:
        """C: channels of a latent (its moments have twice as many)."""
        return self.network.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along a side: 8 for the autoencoder of Stable Diffusion."""
        return 2 ** (len(getattr(self.network.config, self._use.levels)) - 1)

    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and float32 values: the same for any file format, different for other weights."""
        return digest_of(self.network.state_dict())

    def encode(self, pixels_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Pixels in [-1, 1] to ``[B, S, h, w]``, float32: latents (S = C), or of a variational autoencoder moments.

        Moments are means, then log-variances in -30..20 (S = 2C). ``dtype`` is what to compute in: float32, or
        bfloat16 by autocast (8 significant bits of the result).

        Raises:
            UserError: Height or width is no multiple of the downsampling.
            ValueError: Another ``dtype``.
        """
        step = self.downsampling
        if pixels_BCHW.shape[-2] % step or pixels_BCHW.shape[-1] % step:
            raise UserError(
                f'images of {pixels_BCHW.shape[-2]} x {pixels_BCHW.shape[-1]} pixels: both sides must be multiples '
                f'of {step}, the downsampling of {self.path}; crop or resize them'
            )
        with self._computing(pixels_BCHW, dtype) as network:
            return self._use.stored(network.encode(pixels_BCHW.float())).float()

    def decode(self, raw_latents_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw latents ``[B, C, h, w]``, no moments, to pixels ``[B, 3, H, W]``, float32, about [-1, 1], not clamped.

        Raises:
            UserError: The latents have other channels than the autoencoder, e.g. because they are moments.
            ValueError: Another ``dtype`` than in ``encode``.
        """
        if raw_latents_BCHW.shape[1] != self.channels:
            remedy = '; moments must be sampled first, see sample_moments' if self.is_variational else ''
            raise UserError(
                f'latents with {raw_latents_BCHW.shape[1]} channels for {self.path}, which decodes '
                f'{self.channels}{remedy}'
            )
        with self._computing(raw_latents_BCHW, dtype) as network:
            return network.decode(raw_latents_BCHW.float()).sample.float()

    @contextlib.contextmanager
    def _computing(self, x: Tensor, dtype: torch.dtype) -> Iterator[Any]:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f'dtype={dtype}: float32 or bfloat16; half precision overflows in the middle block')
        # A caller's autocast stays out
        autocast = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.no_grad(), autocast:
            yield self.network.to(x.device)
