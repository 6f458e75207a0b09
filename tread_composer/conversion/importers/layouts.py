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

Legend: K stored channels, H x W latent pixels.
"""

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tread_composer.conversion.importers.pickled import array_from_pickle
from tread_composer.conversion.importers.settings import ImportSettings
from tread_composer.conversion.sources.base import OpenFiles, RangeSource, Source, check_names
from tread_composer.conversion.sources.webdataset import scan_tars
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_layout']


def open_layout(settings: ImportSettings, stored_channels: int | None) -> Source:
    """Look through a folder of latents; ``stored_channels`` is K, for LMDB, whose values are bytes without a shape.

    Returns:
        A source whose ``read`` gives arrays ``[K, H, W]`` as they are stored: of the image, then of its mirror image if
        there is one.

    Raises:
        UserError: The source is not of that layout; names the file or the sample.
    """
    root = Path(settings.source)
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; give the one that holds the files of one split')
    if settings.layout == 'maskdit-lmdb':
        assert stored_channels is not None  # the settings have asked for it
        source: Source = _open_lmdb(root, stored_channels)
    elif settings.layout == 'lightningdit':
        source = _open_safetensors(root, _matching(root, settings.files or '*.safetensors'))
    else:
        member = 'latent' if settings.layout == 'maskdit-webdataset' else 'latent.npy'
        source = _open_tars(root, _matching(root, settings.files or '*.tar'), member)
    if not len(source):
        raise UserError(f'{root}: holds no samples')
    check_names(root, source.names)
    return _halves(source) if settings.mirrors == 'second-half' else source


def _matching(root: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f'{root}: no file there matches {pattern}; give the folder of one split, or --files PATTERN')
    return files


@dataclass(eq=False)
class _Opened(Source):
    """A source with an open ``handle``, which each process has to open for itself."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != 'handle'}


@dataclass(eq=False)
class _LMDB(_Opened):
    path: Path
    channels: int

    @functools.cached_property
    def handle(self) -> Any:
        """Reads the value of a key."""
        try:
            import lmdb
        except ImportError as error:
            raise UserError('layout maskdit-lmdb needs lmdb, which is not installed: pip install lmdb') from error
        try:
            # no lock: it would need to write to the source
            environment = lmdb.open(str(self.path), readonly=True, lock=False, create=False, readahead=False)
            return environment.begin(buffers=False).get
        except lmdb.Error as error:
            raise UserError(f'{self.path}: cannot be opened as an LMDB: {error}') from error

    def value(self, key: str) -> bytes:
        """The bytes of a key that must be there."""
        value = self.handle(key.encode())
        if value is None:
            raise UserError(f'{self.path}: has no entry {key}: it is incomplete, or not of this layout')
        return value

    def number(self, key: str) -> int:
        """The decimal text of a key."""
        text = self.value(key)
        try:
            return int(text.decode('ascii'))
        except ValueError as error:
            raise UserError(f'{self.path}, entry {key}: {text[:20]!r} is not a number') from error

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image."""
        data = self.value(self.names[position])
        side = math.isqrt(len(data) // (4 * self.channels))
        if 4 * self.channels * side * side != len(data) or not data:
            raise UserError(
                f'{len(data)} bytes are no square of {self.channels} channels in float32; is --channels (or --kind) '
                f'right?'
            )
        return [np.frombuffer(data, '<f4').reshape(self.channels, side, side)]


def _open_lmdb(root: Path, channels: int) -> Source:
    if not (root / 'data.mdb').is_file():
        inner = sorted(path.parent.name for path in root.glob('*/data.mdb'))
        hint = f'; there is one in {", ".join(inner)}' if inner else ''
        raise UserError(f'{root}: no data.mdb, so no LMDB{hint}')
    source = _LMDB(f'LMDB {root.name} of MaskDiT', (), (), np.empty(0), root, channels)
    count = source.number('length')
    progress = Progress(f'reading labels of {root}', count, 'samples')
    source.names, source.labels = [f'z-{position}' for position in range(count)], np.empty(count, np.int64)
    for position in range(count):
        source.labels[position] = source.number(f'y-{position}')
        progress.add()
    return source


@dataclass(eq=False)
class _Tars(RangeSource):
    member: str

    def read(self, position: int) -> list[np.ndarray]:  # type: ignore[override]
        """``[K, H, W]`` of the image."""
        data = super().read(position)
        try:
            if self.member == 'latent':
                return [array_from_pickle(data)]
            return [np.load(io.BytesIO(data), allow_pickle=False)]
        except Exception as error:  # numpy's errors for damaged arrays are of many kinds
            raise UserError(f'{self.member}: {error}') from error


def _open_tars(root: Path, paths: list[Path], member: str) -> Source:
    samples = scan_tars(root, paths, lambda extension: extension == member)
    numbers, offsets, sizes = np.array(samples.places, np.int64).T
    # keys need only be different within a tar
    names = [
        f'{paths[number].name}/{name.removesuffix(f".{member}")}'
        for (number, *_), name in zip(samples.places, samples.names, strict=True)
    ]
    description = f'webdataset {root.name} ({len(paths)} tars, {member})'
    labels = np.array(samples.labels, np.int64)
    return _Tars(description, (), names, labels, OpenFiles(paths), numbers, offsets, sizes, member)


@dataclass(eq=False)
class _SafeTensors(_Opened):
    paths: list[Path]
    keys: tuple[str, ...]
    starts: np.ndarray

    @functools.cached_property
    def handle(self) -> list[dict[str, Any]]:
        """The tensors of each file, read when they are sliced."""
        from safetensors import safe_open

        files = [safe_open(str(path), framework='pt') for path in self.paths]
        return [{key: file.get_slice(key) for key in self.keys} for file in files]

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` of the image, and of its mirror image if there is one."""
        file = int(np.searchsorted(self.starts, position, side='right')) - 1
        row = int(position - self.starts[file])
        return [self.handle[file][key][row : row + 1][0].float().numpy() for key in self.keys]


def _open_safetensors(root: Path, paths: list[Path]) -> Source:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            'layout lightningdit needs safetensors, which is not installed: pip install safetensors'
        ) from error
    names, starts, labels, mirrored = [], [0], [], set()
    for path in paths:
        try:
            file = safe_open(str(path), framework='pt')
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
        starts.append(len(names))
    if len(mirrored) > 1:
        raise UserError(f'{root}: some files have latents_flip and some have not')
    columns = ('latents', 'latents_flip') if mirrored.pop() else ('latents',)
    description = f'safetensors {root.name} of LightningDiT ({len(paths)} files)'
    return _SafeTensors(description, (), names, np.concatenate(labels), paths, columns, np.array(starts))


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
    return _Halves(source.description, (), source.names[:half], source.labels[:half], source)
