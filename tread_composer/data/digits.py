"""The data set of the first fifteen minutes: scikit-learn's handwritten digits, nothing to download.

1,797 images of 8 x 8 pixels with values 0..16 (Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten
Digits", test part), as pixels in [-1, 1]: ``value / 8 - 1`` is exact in half precision.
Legend: N images.
"""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from streaming import MDSWriter

import tread_composer
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_shards
from tread_composer.data.columns import LABEL, LATENTS, NAME, columns
from tread_composer.data.manifest import FORMAT_VERSION, Manifest
from tread_composer.io.files import to_disk
from tread_composer.io.locks import locked

__all__ = ['EVAL_SAMPLES', 'SPLITS', 'SPLIT_SEED', 'digits_manifest', 'load_digits_arrays', 'prepare_digits']

SPLITS = ('train', 'eval')
SPLIT_SEED = 0
EVAL_SAMPLES = 297
_SHAPE = (1, 8, 8)
_SOURCE = 'scikit-learn digits, {split} split'


def load_digits_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split in memory: images float32 ``[N, 1, 8, 8]`` in [-1, 1] and labels int64 ``[N]``.

    1,500 images to train on and 297 to evaluate with, classes in equal shares, permuted with a fixed seed: row ``i``
    is sample ``i`` of what ``prepare_digits`` writes. ``ValueError`` if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose 'train' or 'eval'")
    values, labels = _all_digits()
    train_ids, eval_ids = _split(labels)
    ids = train_ids if split == 'train' else eval_ids
    images = (values[ids] / 8 - 1).astype(np.float32).reshape(-1, *_SHAPE)
    return images, labels[ids].astype(np.int64)


@functools.cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Values ``[1797, 64]`` and labels ``[1797]`` as scikit-learn reads them from its text file; not to be changed."""
    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    values.flags.writeable = labels.flags.writeable = False
    return values, labels


def prepare_digits(folder: str | os.PathLike[str]) -> None:
    """Write ``folder/train`` and ``folder/eval``; if they are there and whole, do nothing.

    The data are made in a folder beside it and renamed, so ``folder`` is complete or absent whatever happens, and any
    number of processes may call this at once.

    Raises:
        UserError: ``folder`` holds something else or damaged data. Nothing is ever overwritten.
    """
    target = Path(folder).absolute()
    if not _is_filled(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f'.{target.name}.lock'):
            if not _is_filled(target):
                _write_and_rename(target)
    _check(target)


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # RandomState: its streams are frozen for ever, those of numpy's newer generators may change.
    random = np.random.RandomState(SPLIT_SEED)
    order = random.permutation(len(labels))
    # Rank of each image among those of its class, as a share: taking the smallest shares takes classes evenly.
    shares = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        shares[members] = (np.arange(len(members)) + 0.5) / len(members)
    is_eval = np.zeros(len(labels), dtype=bool)
    is_eval[order[np.argsort(shares[order], kind='stable')[:EVAL_SAMPLES]]] = True
    # A permutation of its own: what is left of the first one begins with the classes that were drawn late.
    order = random.permutation(len(labels))
    return order[~is_eval[order]], order[is_eval[order]]


def digits_manifest(split: str) -> Manifest:
    """What a split says about itself, known before it is made."""
    images, _ = load_digits_arrays(split)
    # Both splits carry the statistics of the training images: what a run scales with must not see the others.
    reference, _ = load_digits_arrays('train')
    return Manifest(
        format_version=FORMAT_VERSION,
        kind='pixels',
        autoencoder=None,
        autoencoder_hash=None,
        channels=_SHAPE[0],
        latent_height=_SHAPE[1],
        latent_width=_SHAPE[2],
        resolution=_SHAPE[1],
        crop='none',
        mirrored=False,
        num_samples=len(images),
        num_classes=10,
        class_names=tuple('0123456789'),
        mean=(float(reference.mean(dtype=np.float64)),),
        std=(float(reference.std(dtype=np.float64)),),
        permutation_seed=SPLIT_SEED,
        tool_version=tread_composer.__version__,
        source=_SOURCE.format(split=split),
    )


def _write_and_rename(target: Path) -> None:
    """Called by the holder of the lock: an unfinished folder is of a process that was killed."""
    partial = target.with_name(f'.{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split in SPLITS:
            images, labels = load_digits_arrays(split)
            with MDSWriter(out=str(partial / split), columns=columns('pixels', _SHAPE), hashes=['xxh64']) as writer:
                for image, label in zip(images.astype(np.float16), labels, strict=True):
                    writer.write({LATENTS: image, LABEL: int(label), NAME: 'digits'})
            digits_manifest(split).save(partial / split)
        for path in [*partial.rglob('*'), partial]:
            to_disk(path)
        partial.rename(target)
        to_disk(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_filled(target: Path) -> bool:
    # An empty folder that the user made beforehand counts as absent: a rename replaces it.
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _check(target: Path) -> None:
    """The data are small enough that even a second call can afford to compare every byte with its hash."""
    for split in SPLITS:
        folder, expected = target / split, digits_manifest(split)
        try:
            stored = Manifest.load(folder)
            check_shards(folder, stored, hashes=True)
        except (UserError, NotADirectoryError) as error:
            raise UserError(
                f'{target}: is there, but is not an undamaged copy of the digits ({error}). '
                f'Move it away to have it made again, or choose another folder'
            ) from error
        # Statistics may differ in the last bit between machines, and older versions of this tool are welcome.
        lax = {'mean', 'std', 'tool_version'}
        if stored.model_dump(exclude=lax) != expected.model_dump(exclude=lax):
            raise UserError(
                f'{folder}: holds other data ({stored.source!r}, {stored.num_samples} samples) than the digits '
                f'({expected.source!r}, {expected.num_samples} samples). Choose another folder'
            )
