"""Small sets of images and a small feature network, for the tests of the metrics."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tread_composer.metrics.features import DigitsFeatures


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


class Means:
    """The mean and the spread of each colour: six features, and three logits."""

    name = 'means'
    resolution = None
    num_logits = 3

    def __init__(self) -> None:
        self.images_seen = 0

    def identity(self) -> dict[str, str]:
        return {'name': 'means', 'weights_hash': 'none', 'version': '1'}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.images_seen += len(images)
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2)], 1), pixels.mean(2) / 10


class CountingDigits(DigitsFeatures):
    def __init__(self) -> None:
        self.images_seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        self.images_seen += len(images)
        return super().__call__(images)
