"""What a model is built from: its own autoencoder, held against the data of that model."""

from pathlib import Path

import pytest
import torch

from tread_composer.builders.model import build_model
from tread_composer.config import load_config
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import LatentFacts

ROOT = Path(__file__).parents[2]
diffusers = pytest.importorskip('diffusers')


def test_each_model_of_a_configuration_holds_its_weights_against_its_own_data(tmp_path):
    block = {'down_block_types': ('DownEncoderBlock2D',), 'up_block_types': ('UpDecoderBlock2D',)}
    network = diffusers.AutoencoderKL(**block, block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    network.save_pretrained(tmp_path / 'vae')
    words = [f'autoencoder={{name: kl, path: {tmp_path / "vae"}}}', 'data={name: latents, local: somewhere}']
    config = load_config(ROOT / 'yamls' / 'digits.yaml', [*words, 'callbacks=null'])
    sizes = {'channels': 3, 'latent_height': 8, 'latent_width': 8, 'num_classes': 0, 'class_names': ()}
    sizes |= {'autoencoder': str(tmp_path / 'vae'), 'mean': (0.0,) * 3, 'std': (1.0,) * 3}
    latents = torch.zeros(1, 3, 8, 8)
    first = build_model(config, LatentFacts(**sizes))
    assert first.autoencoder is not None and first.autoencoder.decode(latents).shape == (1, 3, 8, 8)
    second = build_model(config, LatentFacts(**sizes, autoencoder_hash='sha256:0'))
    with pytest.raises(UserError, match=r'not those that made the latents .*sha256:0'):
        second.autoencoder.decode(latents)  # type: ignore[union-attr]
