"""A judge for generated 8 x 8 digits: a small classifier, trained in seconds on the real ones.

It says which share of the images is recognised as the digit that was asked for, and gives features for a Fréchet
distance. Both are figures of this project's quickstart; they compare with nothing outside of it.
"""

import functools
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from tread_composer.metrics.quantity import Quantity

__all__ = ['QUANTITIES', 'DigitsJudge', 'digits_judge', 'real_digits']

QUANTITIES = (
    Quantity('digits/recognised', 'higher', 'share of the samples'),
    Quantity('digits/frechet_distance', 'lower', 'squared distance of features'),
)
"""What the callback ``digits_quality`` reports."""


def real_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """The data set's own splits: images ``[N, 1, 8, 8]`` in [-1, 1] and labels ``[N]`` for ``train`` and ``eval``."""
    # Imported here: the module brings streaming with it, which only the writing of the data needs.
    from tread_composer.data.digits import load_digits_arrays

    arrays = {split: load_digits_arrays(split) for split in ('train', 'eval')}
    return {split: (torch.from_numpy(images), torch.from_numpy(labels)) for split, (images, labels) in arrays.items()}


class DigitsJudge:
    """An MLP of one hidden layer (128 ReLU units) on the 64 pixels; chosen by cross-validation in the train split.

    Args:
        images: ``[N, 1, 8, 8]`` in [-1, 1].
        labels: ``[N]``, 0 to 9.
        seed: Of the initial weights and of the order of the batches.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int = 0) -> None:
        self._network = MLPClassifier((128,), alpha=1e-2, learning_rate_init=3e-3, max_iter=60, random_state=seed)
        # One thread: so small a network gains nothing from more, and its sums come out the same everywhere.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter('ignore', ConvergenceWarning)  # 60 epochs are the recipe, not a failure
            self._network.fit(_flat(images), labels.cpu().numpy())

    def features(self, images: Tensor) -> np.ndarray:
        """The hidden layer's values, float64 ``[N, 128]``, of images ``[N, 1, 8, 8]``."""
        return np.maximum(_flat(images) @ self._network.coefs_[0] + self._network.intercepts_[0], 0.0)

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """The share, 0 to 1, of the images that are classified as their label."""
        return float(self._network.score(_flat(images), labels.cpu().numpy()))


@functools.lru_cache(maxsize=1)
def digits_judge() -> DigitsJudge:
    """The judge trained on the real digits' train split, the same one in every process."""
    return DigitsJudge(*real_digits()['train'])


def _flat(images: Tensor) -> np.ndarray:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
        raise ValueError(f'the digits judge needs images [N, 1, 8, 8] in [-1, 1], got {tuple(images.shape)}')
    return images.detach().cpu().double().clamp(-1.0, 1.0).flatten(1).numpy()
