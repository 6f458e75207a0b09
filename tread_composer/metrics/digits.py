"""A judge for generated 8 x 8 digits: a small classifier, trained in seconds on the real ones.

It recognises digits, and gives features for a Fréchet distance. What is measured with it compares with nothing outside
of this project.
"""

import functools
import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.core.errors import UserError
from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.images import ImageSet
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity

__all__ = ['DigitsFeatures', 'DigitsImages', 'DigitsJudge', 'Recognised', 'digits_judge', 'real_digits']

_RECOGNISED = Quantity('recognised', 'higher', 'share of the samples')


def real_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """The data set's own splits: images ``[N, 1, 8, 8]`` in [-1, 1] and labels ``[N]`` for ``train`` and ``eval``."""
    # Imported here: the module brings streaming with it, which only the writing of the data needs.
    from tread_composer.data.digits import load_digits_arrays

    arrays = {split: load_digits_arrays(split) for split in ('train', 'eval')}
    return {split: (torch.from_numpy(images), torch.from_numpy(labels)) for split, (images, labels) in arrays.items()}


class DigitsJudge:
    """An MLP of one hidden layer (128 ReLU units) on the 64 pixels; chosen by cross-validation in the train split.

    Trained on images ``[N, 1, 8, 8]`` in [-1, 1] and labels ``[N]``, 0 to 9.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int = 0) -> None:
        self._network = MLPClassifier((128,), alpha=1e-2, learning_rate_init=3e-3, max_iter=60, random_state=seed)
        # One thread: so small a network gains nothing from more, and its sums come out the same everywhere.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter('ignore', ConvergenceWarning)  # 60 epochs are the recipe, not a failure
            self._network.fit(_flat(images), labels.cpu().numpy())

    def features(self, images: Tensor) -> np.ndarray:
        """The hidden layer's values, float64 ``[N, 128]``, of images ``[N, 1, 8, 8]`` in [-1, 1]."""
        with threadpool_limits(1):
            return np.maximum(_flat(images) @ self._network.coefs_[0] + self._network.intercepts_[0], 0.0)

    def recognised(self, features_ND: Tensor, labels_N: Tensor) -> float:
        """The share, 0 to 1, of the features whose class is their label."""
        # The output layer, [N, 10]
        scores = features_ND.double().numpy() @ self._network.coefs_[1] + self._network.intercepts_[1]
        return float((self._network.classes_[scores.argmax(1)] == labels_N.cpu().numpy()).mean())


@functools.lru_cache(maxsize=1)
def digits_judge() -> DigitsJudge:
    """The judge trained on the real digits' train split, the same one in every process."""
    return DigitsJudge(*real_digits()['train'])


class DigitsFeatures:
    """The hidden layer of the digits' judge: what it measures is no FID, and is not called one."""

    name = 'digits'
    resolution = 8
    num_logits = 0

    def identity(self) -> dict[str, str]:
        """See ``Extractor``. The hash is of what it makes of real digits: it is trained anew on each machine."""
        return {'name': self.name, 'weights_hash': _judge_hash(), 'version': 'tread_composer digits judge'}

    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, None]:
        """Features float64 ``[B, 128]`` of grey images, 8 x 8; a ``UserError`` where they are in colour."""
        if not (images_B3RR == images_B3RR[:, :1]).all():
            raise UserError("features 'digits' are of grey images, and these are in colour")
        # Bytes back to [-1, 1], as the judge was trained
        return torch.from_numpy(digits_judge().features(images_B3RR[:, :1].cpu().float() / 127.5 - 1)), None


class Recognised(Metric):
    """Share of the images that the classifier behind the features ``digits`` assigns to their own label."""

    name = 'recognised'
    quantities = (_RECOGNISED,)
    needs_labels = True
    reads_features = 'digits'
    compares_with = 'nothing'

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``; a ``UserError`` where nobody knows which digits the images are to be."""
        if samples.labels_N is None:
            raise UserError('metrics: recognised needs the label of each image, and not all of them have one')
        # Features are the layer before the classes
        return [Figure(_RECOGNISED, digits_judge().recognised(samples.features_ND, samples.labels_N))]


class DigitsImages(ImageSet):
    """Real digits as bytes, without a file: ``--reference digits``. Nothing was trained on the split ``eval``."""

    def __init__(self, split: str = 'train') -> None:
        images_N1RR, labels_N = real_digits()[split]
        # Grey repeated: feature networks read colour
        self._images_NRR3 = to_uint8(images_N1RR).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        self._labels = labels_N.tolist()
        super().__init__(Path('digits'), f'scikit-learn digits, {split} split', len(self._labels), 8)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over the pixels."""
        return f'sha256:{hashlib.sha256(self._images_NRR3.tobytes()).hexdigest()}'

    def labels(self) -> list[int]:
        """The digit of each image."""
        return self._labels

    def _load(self, indices: range) -> np.ndarray:
        return self._images_NRR3[indices.start : indices.stop]


@functools.lru_cache(maxsize=1)
def _judge_hash() -> str:
    values = digits_judge().features(real_digits()['eval'][0])
    return f'sha256:{hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}'


def _flat(images: Tensor) -> np.ndarray:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8):
        raise ValueError(f'the digits judge needs images [N, 1, 8, 8] in [-1, 1], got {tuple(images.shape)}')
    return images.detach().cpu().double().clamp(-1.0, 1.0).flatten(1).numpy()
