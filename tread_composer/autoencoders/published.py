"""Scale and shift that papers and releases publish for their latents: ``latents = (raw - shift) * scale``.

Known by SHA-256 of the file with the weights, which anybody can look up or compute; never by a name, nor by the
``scaling_factor`` of a ``config.json``, which a retrained autoencoder may have inherited.
"""

from pathlib import Path
from typing import NamedTuple

from tread_composer.io.files import file_hash

__all__ = ['PUBLISHED', 'Published', 'published_scaling']


class Published(NamedTuple):
    """Whose latents, and what is published for them."""

    name: str
    scale: float
    shift: float = 0.0


_SD = 0.18215  # Rombach et al. 2022 (arXiv 2112.10752), and of those tuned from it
_SDXL = 0.13025  # Podell et al. 2023 (arXiv 2307.01952)
_SD3 = 1.5305, 0.0609  # Esser et al. 2024 (arXiv 2403.03206)
_FLUX = 0.3611, 0.1159  # Black Forest Labs 2024

PUBLISHED = {
    # Each twice where it is released both for diffusers and in the latent-diffusion layout.
    '32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46': Published('sd-vae-ft-ema', _SD),
    'a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815': Published('sd-vae-ft-mse', _SD),
    '735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75': Published('sd-vae-ft-mse', _SD),
    'a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c': Published('Stable Diffusion 1.5', _SD),
    '1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341': Published('SDXL', _SDXL),
    '63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e': Published('SDXL', _SDXL),
    'f9b67a279283625caee39d61eacb5324243848477b4eb535355eaaa8423d4e09': Published('Stable Diffusion 3', *_SD3),
    '8f53304a79335b55e13ec50f63e5157fee4deb2f30d5fae0654e2b2653c109dc': Published('Stable Diffusion 3.5', *_SD3),
    'f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3': Published('FLUX.1', *_FLUX),
    'afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38': Published('FLUX.1', *_FLUX),
    # Trained to give latents that are scaled already, says its repository: the encoder of the pair.
    '10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6': Published('TAEF2', 1.0),
}
"""By SHA-256 of the file."""


def published_scaling(file: Path | None) -> Published | None:
    """What is published for the weights in this file; None for files that are not in the list, and without a file."""
    return None if file is None else PUBLISHED.get(file_hash(file).removeprefix('sha256:'))
