"""What images become: one file for each kind of network."""

import torch

from tread_composer.autoencoders import open_autoencoder
from tread_composer.conversion.encoders.latents import LatentEncoder
from tread_composer.conversion.encoders.moments import MomentsEncoder
from tread_composer.conversion.encoders.pixels import PixelEncoder
from tread_composer.conversion.encoding import ImageEncoder
from tread_composer.conversion.settings import ImageSettings

__all__ = ['LatentEncoder', 'MomentsEncoder', 'PixelEncoder', 'image_encoder']


def image_encoder(settings: ImageSettings, device: torch.device) -> ImageEncoder:
    """The encoder that the settings ask for. A new one is a file here and a line below."""
    if settings.vae is None:
        return PixelEncoder(settings, device)
    network = open_autoencoder(settings.vae, subfolder=settings.vae_subfolder, revision=settings.vae_revision)
    encoder = MomentsEncoder if network.is_variational else LatentEncoder
    return encoder(settings, device, network)
