"""The variational autoencoders of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), through diffusers.

Raw latents are what the network gives: no scale, no shift. Those belong to the training run (`latent_scale`,
`latent_shift`), in one place, and are never applied here.
Legend: B images, C channels of the latent, H x W pixels, h x w latent pixels.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.io.tensors import digest_of

__all__ = ['KL', 'network_class', 'sample_moments']


class KL:
    """A frozen ``AutoencoderKL`` in float32, loaded when it is first needed.

    It is no ``nn.Module`` on purpose: as a part of the model it would enter checkpoints, sharding and the optimizer.
    The network moves to the device of whatever it is given.

    Args:
        path: A folder written by ``save_pretrained``, or a hub id such as ``stabilityai/sd-vae-ft-ema``.
        subfolder: Where in it the autoencoder lies, e.g. ``'vae'`` in a whole pipeline.
        revision: Commit of a hub id; name one for results that can be repeated.

    Attributes:
        id: What the manifest of the data calls it.
        other_weights: Whether weights that are not those of the data may decode.
        expected_hash: The ``weight_hash()`` that the weights must have, for example a manifest's.

    Raises:
        UserError: On first use: diffusers is missing, there is no autoencoder at ``path``, or it has other weights
            than ``expected_hash``.
    """

    def __init__(self, path: str, *, subfolder: str | None = None, revision: str | None = None) -> None:
        self.path, self.subfolder, self.revision = str(path), subfolder, revision
        self.id, self.other_weights = self.path, False
        self.expected_hash: str | None = None
        self._network: Any = None

    @property
    def network(self) -> Any:
        """The ``AutoencoderKL``: frozen, evaluation mode, float32."""
        if self._network is None:
            network = self._load().requires_grad_(False).eval()
            digest = None if self.expected_hash is None else digest_of(network.state_dict())
            if digest != self.expected_hash:
                raise UserError(
                    f'autoencoder {self.path!r}: its weights are not those that made the latents ({digest}, '
                    f'the manifest of the data says {self.expected_hash}); name the one of the data, or set '
                    f'autoencoder.other_weights: true if only the decoder was tuned further'
                )
            self._network = network
        return self._network

    def _load(self) -> Any:
        path, network = self.path, network_class(self.path)
        # Hub ids are `owner/name`; anything else that is no folder is a mistyped path, not a reason to ask the network.
        if not Path(path).is_dir() and (path.startswith(('.', '/', '~')) or path.count('/') != 1):
            raise UserError(f'autoencoder {path!r}: no such folder, and not of the form owner/name of a hub id')
        try:
            # safetensors only: the other format is a pickle, which can run code when it is loaded
            return network.from_pretrained(
                path,
                use_safetensors=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,  # else diffusers prints a hint to install accelerate at each load
                subfolder=self.subfolder,
                revision=self.revision,
            )
        except OSError as error:
            raise UserError(
                f'autoencoder {path!r}: no AutoencoderKL with safetensors weights could be loaded from there '
                f'({error}). Give a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id that '
                f'is reachable'
            ) from error

    @property
    def channels(self) -> int:
        """C: channels of a latent (its moments have twice as many)."""
        return self.network.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along a side: 8 for the autoencoder of Stable Diffusion."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and float32 values: the same for any file format, different for other weights."""
        return digest_of(self.network.state_dict())

    def encode(self, pixels_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Pixels in [-1, 1] to moments ``[B, 2C, h, w]``, float32: means, then log-variances in -30..20.

        ``dtype`` is what to compute in: float32, or bfloat16 by autocast (8 significant bits of the result).

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
            posterior = network.encode(pixels_BCHW.float()).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def decode(self, raw_latents_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw latents ``[B, C, h, w]``, no moments, to pixels ``[B, 3, H, W]``, float32, about [-1, 1], not clamped.

        Raises:
            UserError: The latents have other channels than the autoencoder, e.g. because they are moments.
            ValueError: Another ``dtype`` than in ``encode``.
        """
        if raw_latents_BCHW.shape[1] != self.channels:
            raise UserError(
                f'latents with {raw_latents_BCHW.shape[1]} channels for {self.path}, which decodes {self.channels}; '
                f'moments must be sampled first, see sample_moments'
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


def network_class(path: str) -> Any:
    """``diffusers.AutoencoderKL``, imported when first needed (it takes seconds); a ``UserError`` without diffusers."""
    try:
        from diffusers import AutoencoderKL  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            f"autoencoder {path!r} needs diffusers, which is not installed: pip install 'tread_composer[diffusers]'"
        ) from error
    return AutoencoderKL


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
