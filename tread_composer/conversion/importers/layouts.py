"""How other projects lay out latents on disk: each layout as a ``Source`` of arrays, in the order of its files.

Layouts, as the code that writes or reads them has it:

- ``maskdit-lmdb`` (Anima-Lab/MaskDiT): an LMDB with ``z-<i>`` (float32 moments, the encoder's raw output), ``y-<i>``
  (the label as decimal text) and ``length``. With their ``--xflip`` the mirrored images follow in the same order.
- ``maskdit-webdataset``: the same made into tars: ``<key>.latent`` (the array, pickled), ``<key>.cls``.
- ``tread-webdataset`` (CompVis/tread): tars with ``<key>.latent.npy`` and ``<key>.cls``. Their reader neither samples
  nor scales, and their decoder divides by 0.18215: samples, already scaled.
- ``lightningdit`` (hustvl/LightningDiT): safetensors files with ``latents`` and ``latents_flip`` (one draw each of the
  posterior, not normalised) and ``labels``. ``latents_stats.pt`` beside them is not needed: statistics are computed.
  Extracted on several GPUs, a few of the first images may be in there twice (the ranks' shares were made equal).
- ``repa`` (sihyun-yu/REPA, as NVlabs/edm2 before it): ``00000/img-mean-std-00000000.npy``, mean and standard deviation
  as the encoder gives them, float32 ``[2C, H, W]``, beside ``dataset.json`` with the labels. No mirror images.
- ``fast-dit`` (chuanyangjin/fast-DiT): ``..._features/<i>.npy``, one draw each, scaled (0.18215), ``[1, C, H, W]``, and
  ``..._labels/<i>.npy``, ``[1]``. Half of the images were mirrored at random before they were encoded. Each process
  counts from 0, so of an extraction on several GPUs only one share is left: hence the question for the number.

Legend: C channels of the latent, K stored channels, H x W latent pixels.
"""

import contextlib
import functools
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tread_composer.conversion.settings import ImportSettings
from tread_composer.conversion.sources.cifar import load_plain
from tread_composer.conversion.sources.labels import EDM, edm_labels
from tread_composer.conversion.sources.numbered import check_numbers
from tread_composer.conversion.sources.source import IndexedFiles, Source, check_names, few, refusing
from tread_composer.conversion.sources.tars import scan_tars
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['array_from_pickle', 'open_layout']


def open_layout(settings: ImportSettings, stored_channels: int | None) -> Source:
    """Arrays ``[K, H, W]`` as they are stored: of the image, then of its mirror image if there is one.

    ``stored_channels`` is K, for LMDB, whose values are bytes without a shape. What is not of that layout is refused.
    """
    root, layout = Path(settings.source), settings.layout
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; give the one that holds the files of one split')
    if layout == 'maskdit-lmdb':
        assert stored_channels is not None  # the settings have asked for it
        source = _open_lmdb(root, stored_channels)
    elif layout == 'repa':
        source = _open_repa(root)
    elif layout == 'fast-dit':
        source = _open_fast_dit(root)
    elif layout == 'lightningdit':
        source = _open_safetensors(root, _matching(root, settings.files or '*.safetensors'))
    else:
        source = _open_tars(root, _matching(root, settings.files or '*.tar'), is_pickled=layout == 'maskdit-webdataset')
    if not len(source):
        raise UserError(f'{root}: holds no samples')
    check_names(root, source.names)
    # A file that is missing shows in nothing else. LightningDiT's ranks were given equal shares: at most one more each.
    excess = int(source.places[-1][0]) + 1 if layout == 'lightningdit' else 0
    source = _halves(source) if settings.mirrors == 'second-half' else source
    if settings.num_images and not settings.num_images <= len(source) <= settings.num_images + excess:
        raise UserError(
            f'--num-images {settings.num_images}: {settings.source} holds {len(source):,} samples. Files are missing '
            f'or too many, or the number is that of another split'
        )
    return source


def _arrays(title: str, names: list[str], labels: Any, places: Any, load: Callable[..., list[np.ndarray]]) -> Source:
    return Source(title, (), names, np.asarray(labels, np.int64), np.asarray(places, np.int64), load)


def _matching(root: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f'{root}: no file there matches {pattern}; give the folder of one split, or --files PATTERN')
    check_numbers(root, files)
    return files


def _halves(source: Source) -> Source:
    """The second half of the samples are the mirror images of the first, in the same order."""
    half, odd = divmod(len(source), 2)
    if odd or not np.array_equal(source.labels[:half], source.labels[half:]):
        raise UserError(
            f'{source.description}: the second half of {len(source)} samples cannot be the mirror images of the first: '
            f'the labels are not the same. Say --mirrors none'
        )
    places = np.hstack([source.places[:half], source.places[half:]])
    load = functools.partial(_load_both, source.load)
    return replace(source, names=source.names[:half], labels=source.labels[:half], places=places, load=load)


def _load_both(load: Callable[..., list[np.ndarray]], name: str, *places: int) -> list[np.ndarray]:
    half = len(places) // 2
    return [*load(name, *places[:half]), *load(name, *places[half:])]


@contextlib.contextmanager
def _lmdb(path: Path) -> Iterator[Callable[[str], bytes]]:
    """Reads the value of a key, which must be there."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError('layout maskdit-lmdb needs lmdb, which is not installed: pip install lmdb') from error

    def value_of(key: str) -> bytes:
        value = transaction.get(key.encode())
        if value is None:
            raise UserError(f'{path}: has no entry {key}: it is incomplete, or not of this layout')
        return value

    # no lock: it would need to write to the source
    options = {'readonly': True, 'lock': False, 'create': False, 'readahead': False}
    with (
        refusing(lmdb.Error, f'{path}: cannot be read as an LMDB'),
        lmdb.open(str(path), **options) as environment,
        environment.begin() as transaction,
    ):
        yield value_of


def _open_lmdb(root: Path, channels: int) -> Source:
    if not (root / 'data.mdb').is_file():
        inner = sorted(path.parent.name for path in root.glob('*/data.mdb'))
        hint = f'; there is one in {", ".join(inner)}' if inner else ''
        raise UserError(f'{root}: no data.mdb, so no LMDB{hint}')
    labels: list[int] = []
    with _lmdb(root) as value_of, refusing(ValueError, f'{root}: the length or a label is not a number'):
        count = int(value_of('length'))
        progress = Progress(f'reading labels of {root}', count, 'samples')
        for position in range(count):
            labels.append(int(value_of(f'y-{position}')))
            progress.add()
    names = [f'z-{position}' for position in range(count)]
    load = functools.partial(_load_lmdb, root, channels)
    return _arrays(f'LMDB {root.name} of MaskDiT', names, labels, np.arange(count).reshape(-1, 1), load)


def _load_lmdb(path: Path, channels: int, name: str, number: int) -> list[np.ndarray]:
    with _lmdb(path) as value_of:
        data = value_of(f'z-{number}')
    side = math.isqrt(len(data) // (4 * channels))
    if 4 * channels * side * side != len(data) or not data:
        raise UserError(
            f'{len(data)} bytes are no square of {channels} channels in float32; is --channels (or --kind) right?'
        )
    return [np.frombuffer(data, '<f4').reshape(channels, side, side)]


def _open_tars(root: Path, paths: list[Path], is_pickled: bool) -> Source:
    member = 'latent' if is_pickled else 'latent.npy'
    samples = scan_tars(root, paths, lambda extension: extension == member)
    # keys need only be different within a tar
    names = [
        f'{paths[number].name}/{name.removesuffix(f".{member}")}'
        for (number, *_), name in zip(samples.places, samples.names, strict=True)
    ]
    load = functools.partial(_load_member, IndexedFiles(paths), member, array_from_pickle if is_pickled else _npy)
    return _arrays(f'webdataset {root.name} ({len(paths)} tars, {member})', names, samples.labels, samples.places, load)


def _load_member(
    files: IndexedFiles, member: str, array: Callable[[bytes], np.ndarray], *place: Any
) -> list[np.ndarray]:
    data = files.read(*place)
    with refusing(Exception, member):  # numpy's errors for damaged arrays are of many kinds
        return [array(data)]


def _npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def array_from_pickle(data: bytes) -> np.ndarray:
    """The floating-point array that was pickled; ``ValueError`` if anything else is in there, which has not run."""
    try:
        array = load_plain(data)
    except ValueError as error:
        raise ValueError(f'not a pickled array of floats: {error}') from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != 'f':
        raise ValueError(f'not a pickled array of floats: {type(array).__name__}')
    return array


def _open_safetensors(root: Path, paths: list[Path]) -> Source:
    names, places, labels, mirrored = [], [], [], set()
    for number, path in enumerate(paths):
        damage = (SafetensorError, OSError, IndexError)
        with refusing(damage, f'{path}: cannot be read as safetensors'), safe_open(str(path), framework='pt') as file:
            keys = set(file.keys())
            if not {'latents', 'labels'} <= keys <= {'latents', 'latents_flip', 'labels'}:
                raise UserError(f'{path}: holds {sorted(keys)}, not latents, latents_flip and labels')
            rows = {key: file.get_slice(key).get_shape()[0] for key in keys}
            numbers = file.get_tensor('labels')
        if numbers.ndim != 1 or numbers.is_floating_point():
            shape = tuple(numbers.shape)
            raise UserError(f'{path}: its labels are {numbers.dtype} of shape {shape}, not a list of whole numbers')
        labels.append(numbers.numpy().astype(np.int64))
        if len(set(rows.values())) > 1:
            raise UserError(f'{path}: as many latents as labels are needed, but there are {rows}')
        mirrored.add('latents_flip' in keys)
        names += [f'{path.name}:{row}' for row in range(rows['labels'])]
        places += [(number, row) for row in range(rows['labels'])]
    if len(mirrored) > 1:
        raise UserError(f'{root}: some files have latents_flip and some have not')
    load = functools.partial(_load_tensors, paths, ('latents', 'latents_flip') if mirrored.pop() else ('latents',))
    description = f'safetensors {root.name} of LightningDiT ({len(paths)} files)'
    return _arrays(description, names, np.concatenate(labels), places, load)


def _load_tensors(paths: list[Path], keys: Sequence[str], name: str, number: int, row: int) -> list[np.ndarray]:
    with safe_open(str(paths[number]), framework='pt') as file:
        return [file.get_slice(key)[row : row + 1][0].float().numpy() for key in keys]


def _open_repa(root: Path) -> Source:
    """The folder with ``dataset.json``: in REPA's data that is ``vae-sd``."""
    table = root / EDM
    names = sorted(str(path.relative_to(root)) for path in root.glob('*/*.npy'))
    if not table.is_file() or not names:
        raise UserError(f'{root}: no {EDM}, or no .npy files in folders beside it; give the folder vae-sd')
    labels = edm_labels(str(table), names, table.read_bytes()) or [-1] * len(names)
    load = functools.partial(_load_deviations, root)
    return _arrays(f'npy files {root.name} of REPA', names, labels, np.empty((len(names), 0)), load)


def _load_deviations(root: Path, name: str) -> list[np.ndarray]:
    """Moments ``[2C, H, W]`` of means and standard deviations."""
    array = _load_file(root / name)
    if array.ndim != 3 or len(array) % 2 or (array[len(array) // 2 :] < 0).any():
        raise UserError(f'an array of shape {array.shape}, where means and deviations of 2C x H x W are expected')
    mean, std = np.split(array, 2)
    with np.errstate(divide='ignore'):  # a deviation of 0; log-variances are clipped later
        return [np.concatenate([mean, 2 * np.log(std)])]


def _open_fast_dit(root: Path) -> Source:
    """The folder that holds those of features and of labels."""
    folders = [(path, root / f'{path.name.removesuffix("_features")}_labels') for path in root.glob('*_features')]
    pairs = [(features, folder) for features, folder in folders if folder.is_dir()]
    if len(pairs) != 1:
        raise UserError(f'{root}: {len(pairs)} pairs of folders ..._features and ..._labels in it, 1 is expected')
    (features, folder), labels = pairs[0], []
    numbers = sorted(int(path.stem) for path in features.glob('*.npy') if re.fullmatch(r'\d+', path.stem))
    if missing := set(range(len(numbers))) - set(numbers):
        raise UserError(f'{features}: the numbers of its files have gaps, such as {min(missing)}. Copy it completely')
    if extra := {path.stem for path in folder.glob('*.npy')} ^ {str(number) for number in numbers}:
        raise UserError(f'{root}: features without labels, or the reverse: {few(extra)}. Copy it completely')
    progress = Progress(f'reading labels of {root}', len(numbers), 'samples')
    for path in (folder / f'{number}.npy' for number in numbers):
        array = _load_file(path)
        if array.shape != (1,) or array.dtype.kind not in 'iu':
            raise UserError(f'{path}: {array.dtype} of shape {array.shape}, where the label is expected')
        labels.append(int(array[0]))
        progress.add()
    names = [f'{number}.npy' for number in numbers]
    load = functools.partial(_load_draw, features)
    return _arrays(f'npy files {features.name} of fast-DiT', names, labels, np.empty((len(names), 0)), load)


def _load_draw(folder: Path, name: str) -> list[np.ndarray]:
    array = _load_file(folder / name)
    if array.ndim != 4 or len(array) != 1:
        raise UserError(f'an array of shape {array.shape}, where 1 x C x H x W is expected')
    return [array[0]]


def _load_file(path: Path) -> np.ndarray:
    with refusing(Exception, f'{path}: not an array'):  # numpy's errors for damaged arrays are of many kinds
        return np.load(path, allow_pickle=False)
