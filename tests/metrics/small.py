"""Small sets of images, a small feature network and a protocol, for the tests of whatever measures."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tread_composer.metrics.features import Extractor, FeatureSet, joined, looked
from tread_composer.metrics.protocol import Protocol

PROTOCOL = Protocol(
    weights='ema', num_samples=10_000, labels='balanced', seed=0,
    sampling={'sampler': 'heun', 'num_steps': 50, 'sampler_settings': {}, 'guidance': 'none', 'guidance_scale': 1.0},
    autoencoder='some/vae', autoencoder_hash='sha256:aa', decode_dtype='float32', uint8_rule='rule',
    reference={'name': 'reference.npz', 'kind': 'adm'}, reference_hash='sha256:bb',
    features={'name': 'inception', 'weights_hash': 'sha256:cc', 'version': '0.4.0'}, resolution=256,
    time_grid={'objective': 'edm', 'sigma_min': 0.002, 'sigma_max': 80.0, 'rho': 7.0}, weak='none',
).to_dict()  # fmt: skip


def random_images(count: int, resolution: int = 8, seed: int = 0) -> np.ndarray:
    """uint8 ``[N, R, R, 3]``."""
    return np.random.RandomState(seed).randint(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)


def grey_images(count: int, seed: int = 0) -> np.ndarray:
    """uint8 ``[N, 8, 8, 3]``, as the digits' features want them."""
    return random_images(count, seed=seed)[..., :1].repeat(3, axis=3)


def as_batch(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f'{index:06d}.png')
    return folder


def extract(batches: Iterable[Tensor], extractor: Extractor) -> FeatureSet:
    """The features of all images."""
    return joined(looked(batches, extractor))


class Means:
    """The mean and the spread of each colour: six features, and three logits."""

    name = 'means'
    resolution = None
    num_logits = 3

    def identity(self) -> dict[str, str]:
        return {'name': 'means', 'weights_hash': 'none', 'version': '1'}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1), pixels.mean(2) / 10
