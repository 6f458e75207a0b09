"""Latents with a ``.npy`` file for each image, each layout as the code that writes and reads it has it.

- ``repa`` (sihyun-yu/REPA, as NVlabs/edm2 before it): ``00000/img-mean-std-00000000.npy``, mean and standard deviation
  as the encoder gives them, float32 ``[2C, H, W]``, beside ``dataset.json`` with the labels. No mirror images.
- ``fast-dit`` (chuanyangjin/fast-DiT): ``..._features/<i>.npy``, one draw each, scaled (0.18215), ``[1, C, H, W]``, and
  ``..._labels/<i>.npy``, ``[1]``. Half of the images were mirrored at random before they were encoded. Each process
  counts from 0, so of an extraction on several GPUs only one share is left: hence the question for the number.

Legend: C channels of the latent, K stored channels, H x W latent pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tread_composer.conversion.sources.base import Source, few
from tread_composer.conversion.sources.tree import edm_labels
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_fast_dit', 'open_repa']


@dataclass(eq=False)
class _Files(Source):
    """A file each, named by its path below ``folder``."""

    folder: Path

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image."""
        return [_array(self.folder / self.names[position])]


class _Draws(_Files):
    def read(self, position: int) -> list[np.ndarray]:
        """``[C, H, W]`` of the image."""
        (array,) = super().read(position)
        if array.ndim != 4 or len(array) != 1:
            raise UserError(f'an array of shape {array.shape}, where 1 x C x H x W is expected')
        return [array[0]]


class _Deviations(_Files):
    def read(self, position: int) -> list[np.ndarray]:
        """Moments ``[2C, H, W]`` of the image."""
        (array,) = super().read(position)
        if array.ndim != 3 or len(array) % 2 or (array[len(array) // 2 :] < 0).any():
            raise UserError(f'an array of shape {array.shape}, where means and deviations of 2C x H x W are expected')
        mean, std = np.split(array, 2)
        with np.errstate(divide='ignore'):  # a deviation of 0; log-variances are clipped later
            return [np.concatenate([mean, 2 * np.log(std)])]


def open_repa(root: Path) -> Source:
    """The folder with ``dataset.json``: in REPA's data that is ``vae-sd``."""
    table = root / 'dataset.json'
    names = sorted(str(path.relative_to(root)) for path in root.glob('*/*.npy'))
    if not table.is_file() or not names:
        raise UserError(f'{root}: no dataset.json, or no .npy files in folders beside it; give the folder vae-sd')
    labels = edm_labels(str(table), names, table.read_bytes())
    description = f'npy files {root.name} of REPA'
    return _Deviations(description, (), names, *_columns([-1] * len(names) if labels is None else labels), folder=root)


def open_fast_dit(root: Path) -> Source:
    """The folder that holds those of features and of labels."""
    pairs = [path for path in sorted(root.glob('*_features')) if _labels_of(path).is_dir()]
    if len(pairs) != 1:
        raise UserError(f'{root}: {len(pairs)} pairs of folders ..._features and ..._labels in it, 1 is expected')
    features, labels = pairs[0], []
    numbers = sorted(int(path.stem) for path in features.glob('*.npy') if re.fullmatch(r'\d+', path.stem))
    if missing := set(range(len(numbers))) - set(numbers):
        raise UserError(f'{features}: the numbers of its files have gaps, such as {min(missing)}. Copy it completely')
    if extra := {path.stem for path in _labels_of(features).glob('*.npy')} ^ {str(number) for number in numbers}:
        raise UserError(f'{root}: features without labels, or the reverse: {few(extra)}. Copy it completely')
    progress = Progress(f'reading labels of {root}', len(numbers), 'samples')
    for number in numbers:
        path = _labels_of(features) / f'{number}.npy'
        array = _array(path)
        if array.shape != (1,) or array.dtype.kind not in 'iu':
            raise UserError(f'{path}: {array.dtype} of shape {array.shape}, where the label is expected')
        labels.append(int(array[0]))
        progress.add()
    names = [f'{number}.npy' for number in numbers]
    return _Draws(f'npy files {features.name} of fast-DiT', (), names, *_columns(labels), folder=features)


def _labels_of(features: Path) -> Path:
    return features.with_name(f'{features.name.removesuffix("_features")}_labels')


def _columns(labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(labels, np.int64), np.empty((len(labels), 0), np.int64)  # the names say the places


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's errors for damaged arrays are of many kinds
        raise UserError(f'{path}: not an array: {error}') from error
