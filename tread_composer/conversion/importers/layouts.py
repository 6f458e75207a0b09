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
- ``repa``, ``fast-dit``: see ``npy``.

Legend: K stored channels, H x W latent pixels.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open

from tread_composer.conversion.importers.npy import open_fast_dit, open_repa
from tread_composer.conversion.importers.settings import ImportSettings
from tread_composer.conversion.pickles import load_plain
from tread_composer.conversion.sources.base import IndexedFiles, RangeSource, Source, check_names
from tread_composer.conversion.sources.numbered import check_numbers
from tread_composer.conversion.sources.webdataset import scan_tars
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['array_from_pickle', 'open_layout']


def open_layout(settings: ImportSettings, stored_channels: int | None) -> Source:
    """Look through a folder of latents; ``stored_channels`` is K, for LMDB, whose values are bytes without a shape.

    The source's ``read`` gives arrays ``[K, H, W]`` as they are stored: of the image, then of its mirror image if there
    is one. What is not of that layout is refused with the file or the sample.
    """
    root = Path(settings.source)
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; give the one that holds the files of one split')
    if settings.layout == 'maskdit-lmdb':
        assert stored_channels is not None  # the settings have asked for it
        source = _open_lmdb(root, stored_channels)
    elif settings.layout == 'repa':
        source = open_repa(root)
    elif settings.layout == 'fast-dit':
        source = open_fast_dit(root)
    elif settings.layout == 'lightningdit':
        source = _open_safetensors(root, _matching(root, settings.files or '*.safetensors'))
    else:
        kind = _Pickled if settings.layout == 'maskdit-webdataset' else _Arrays
        source = _open_tars(root, _matching(root, settings.files or '*.tar'), kind)
    if not len(source):
        raise UserError(f'{root}: holds no samples')
    check_names(root, source.names)
    source = _halves(source) if settings.mirrors == 'second-half' else source
    _check_count(source, settings)
    return source


def _check_count(source: Source, settings: ImportSettings) -> None:
    """A file that is missing shows in nothing else."""
    if settings.num_images is None:
        return
    # LightningDiT's ranks were given equal shares: at most one more on each.
    excess = len(source.paths) if isinstance(source, _SafeTensors) else 0
    if not settings.num_images <= len(source) <= settings.num_images + excess:
        raise UserError(
            f'--num-images {settings.num_images}: {settings.source} holds {len(source):,} samples. Files are missing '
            f'or too many, or the number is that of another split'
        )


def _matching(root: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f'{root}: no file there matches {pattern}; give the folder of one split, or --files PATTERN')
    check_numbers(root, files)
    return files


@dataclass(eq=False)
class _LMDB(Source):
    path: Path
    channels: int

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image."""
        with _lmdb(self.path) as value_of:
            data = value_of(self.names[position])
        side = math.isqrt(len(data) // (4 * self.channels))
        if 4 * self.channels * side * side != len(data) or not data:
            raise UserError(
                f'{len(data)} bytes are no square of {self.channels} channels in float32; is --channels (or --kind) '
                f'right?'
            )
        return [np.frombuffer(data, '<f4').reshape(self.channels, side, side)]


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

    try:
        # no lock: it would need to write to the source
        with (
            lmdb.open(str(path), readonly=True, lock=False, create=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            yield value_of
    except lmdb.Error as error:
        raise UserError(f'{path}: cannot be read as an LMDB: {error}') from error


def _open_lmdb(root: Path, channels: int) -> Source:
    if not (root / 'data.mdb').is_file():
        inner = sorted(path.parent.name for path in root.glob('*/data.mdb'))
        hint = f'; there is one in {", ".join(inner)}' if inner else ''
        raise UserError(f'{root}: no data.mdb, so no LMDB{hint}')
    labels: list[int] = []
    with _lmdb(root) as value_of:
        try:
            count = int(value_of('length'))
            progress = Progress(f'reading labels of {root}', count, 'samples')
            for position in range(count):
                labels.append(int(value_of(f'y-{position}')))
                progress.add()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f'{root}: the length or label {len(labels)} is not a number: {error}') from error
    names = [f'z-{position}' for position in range(count)]
    places = np.empty((count, 0), np.int64)  # the names say it
    return _LMDB(f'LMDB {root.name} of MaskDiT', (), names, np.array(labels, np.int64), places, root, channels)


@dataclass(eq=False)
class _Arrays(RangeSource):
    MEMBER: ClassVar = 'latent.npy'

    def read(self, position: int) -> list[np.ndarray]:  # type: ignore[override]
        """``[K, H, W]`` of the image."""
        data = super().read(position)
        try:
            return [self.array(data)]
        except Exception as error:  # numpy's errors for damaged arrays are of many kinds
            raise UserError(f'{self.MEMBER}: {error}') from error

    @staticmethod
    def array(data: bytes) -> np.ndarray:
        """The array that a member holds."""
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


class _Pickled(_Arrays):
    MEMBER: ClassVar = 'latent'
    array = staticmethod(array_from_pickle)


def _open_tars(root: Path, paths: list[Path], kind: type[_Arrays]) -> Source:
    samples = scan_tars(root, paths, lambda extension: extension == kind.MEMBER)
    # keys need only be different within a tar
    names = [
        f'{paths[number].name}/{name.removesuffix(f".{kind.MEMBER}")}'
        for (number, *_), name in zip(samples.places, samples.names, strict=True)
    ]
    description = f'webdataset {root.name} ({len(paths)} tars, {kind.MEMBER})'
    labels, places = np.array(samples.labels, np.int64), np.array(samples.places, np.int64)
    return kind(description, (), names, labels, places, IndexedFiles(paths))


@dataclass(eq=False)
class _SafeTensors(Source):
    paths: list[Path]
    keys: tuple[str, ...]

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image, and of its mirror image if there is one."""
        number, row = self.places[position].tolist()
        with safe_open(str(self.paths[number]), framework='pt') as file:
            return [file.get_slice(key)[row : row + 1][0].float().numpy() for key in self.keys]


def _open_safetensors(root: Path, paths: list[Path]) -> Source:
    names, places, labels, mirrored = [], [], [], set()
    for number, path in enumerate(paths):
        try:
            with safe_open(str(path), framework='pt') as file:
                keys = set(file.keys())
                if not {'latents', 'labels'} <= keys <= {'latents', 'latents_flip', 'labels'}:
                    raise UserError(f'{path}: holds {sorted(keys)}, not latents, latents_flip and labels')
                rows = {key: file.get_slice(key).get_shape()[0] for key in keys}
                labels.append(file.get_tensor('labels').numpy().astype(np.int64))
        except (SafetensorError, OSError, IndexError) as error:
            raise UserError(f'{path}: cannot be read as safetensors: {error}') from error
        if len(set(rows.values())) > 1:
            raise UserError(f'{path}: as many latents as labels are needed, but there are {rows}')
        mirrored.add('latents_flip' in keys)
        names += [f'{path.name}:{row}' for row in range(rows['labels'])]
        places += [(number, row) for row in range(rows['labels'])]
    if len(mirrored) > 1:
        raise UserError(f'{root}: some files have latents_flip and some have not')
    columns = ('latents', 'latents_flip') if mirrored.pop() else ('latents',)
    description = f'safetensors {root.name} of LightningDiT ({len(paths)} files)'
    return _SafeTensors(description, (), names, np.concatenate(labels), np.array(places), paths, columns)


@dataclass(eq=False)
class _Halves(Source):
    whole: Source

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image, and of its mirror image."""
        return [*self.whole.read(position), *self.whole.read(position + len(self))]


def _halves(source: Source) -> Source:
    """The second half of the samples are the mirror images of the first, in the same order."""
    half, odd = divmod(len(source), 2)
    if odd or not np.array_equal(source.labels[:half], source.labels[half:]):
        raise UserError(
            f'{source.description}: the second half of {len(source)} samples cannot be the mirror images of the first: '
            f'the labels are not the same. Say --mirrors none'
        )
    return _Halves(source.description, (), source.names[:half], source.labels[:half], source.places[:half], source)
