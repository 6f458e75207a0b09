"""How other projects lay out latents on disk: each layout as labels, names and arrays at any position.

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

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tread_composer.conversion.importers.pickled import array_from_pickle
from tread_composer.conversion.sources.ranges import OpenFiles
from tread_composer.conversion.sources.tars import Archive
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['LAYOUTS', 'Layout', 'open_layout']

LAYOUTS = ('maskdit-lmdb', 'maskdit-webdataset', 'tread-webdataset', 'lightningdit')


class Layout(Protocol):
    """Stored latents with random access.

    Attributes:
        labels: int64, one for each sample.
        mirrored: Whether ``read`` gives the latents of the mirrored image, too.
        description: One line for the manifest.
    """

    labels: np.ndarray
    mirrored: bool
    description: str

    def name(self, position: int) -> str:
        """Where the sample comes from; no other one has this name."""
        ...

    def read(self, position: int) -> list[np.ndarray]:
        """``[K, H, W]`` as stored: of the image, then of its mirror image if there is one.

        Raises:
            UserError: The sample is damaged; names it.
        """
        ...


def open_layout(
    layout: str, source: Path, *, files: str | None = None, stored_channels: int | None = None, mirrors: bool = False
) -> Layout:
    """Look through a source and give access to its samples.

    Args:
        layout: One of ``LAYOUTS``.
        source: The folder with the files of one split.
        files: Pattern of the files' names, where the layout has several files. (Default: all with the right ending.)
        stored_channels: K, for LMDB, whose values are bytes without a shape.
        mirrors: MaskDiT's layouts: the second half of the samples are the mirror images of the first.

    Raises:
        UserError: The source is not of that layout; names the file or the sample.
    """
    if not source.is_dir():
        raise UserError(f'{source}: no such folder; give the one that holds the files of one split')
    if layout == 'maskdit-lmdb':
        assert stored_channels is not None  # the command line has asked for it
        layout_reader: Layout = _LMDB(source, stored_channels)
    elif layout == 'maskdit-webdataset':
        layout_reader = _Tars(_matching(source, files or '*.tar'), 'latent', array_from_pickle)
    elif layout == 'tread-webdataset':
        layout_reader = _Tars(_matching(source, files or '*.tar'), 'latent.npy', _array_from_npy)
    elif layout == 'lightningdit':
        layout_reader = _SafeTensors(_matching(source, files or '*.safetensors'))
    else:
        raise UserError(f'layout {layout!r} is not known; choose one of {", ".join(LAYOUTS)}')
    if not len(layout_reader.labels):
        raise UserError(f'{source}: holds no samples')
    return _Halves(layout_reader) if mirrors else layout_reader


def _matching(source: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in source.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f'{source}: no file there matches {pattern}; give the folder of one split, or --files PATTERN')
    return files


def _label(text: bytes, where: str) -> int:
    try:
        return int(bytes(text).decode('ascii'))
    except ValueError as error:
        raise UserError(f'{where}: the label {bytes(text[:20])!r} is not a number') from error


class _LMDB:
    mirrored = False

    def __init__(self, source: Path, stored_channels: int) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise UserError('layout maskdit-lmdb needs lmdb, which is not installed: pip install lmdb') from error
        if not (source / 'data.mdb').is_file():
            inner = sorted(path.parent.name for path in source.glob('*/data.mdb'))
            hint = f'; there is one in {", ".join(inner)}' if inner else ''
            raise UserError(f'{source}: no data.mdb, so no LMDB{hint}')
        self._source, self._channels = source, stored_channels
        try:
            # no lock: it would need to write to the source
            environment = lmdb.open(str(source), readonly=True, lock=False, create=False, readahead=False)
            self._get: Callable[[bytes], bytes | None] = environment.begin(buffers=False).get
        except lmdb.Error as error:
            raise UserError(f'{source}: cannot be opened as an LMDB: {error}') from error
        count = _label(self._value('length'), f'{source}, entry length')
        progress = Progress(f'reading labels of {source}', count, 'samples')
        self.labels = np.empty(count, np.int64)
        for position in range(count):
            key = f'y-{position}'
            self.labels[position] = _label(self._value(key), f'{source}, entry {key}')
            progress.add()
        self.description = f'LMDB {source.name} of MaskDiT'

    def name(self, position: int) -> str:
        return f'z-{position}'

    def read(self, position: int) -> list[np.ndarray]:
        """The latents of the sample at this position, ``[C, H, W]`` each."""
        data = self._value(f'z-{position}')
        side = math.isqrt(len(data) // (4 * self._channels))
        if 4 * self._channels * side * side != len(data) or not data:
            raise UserError(
                f'{self._source}, entry z-{position}: {len(data)} bytes are no square of {self._channels} channels in '
                f'float32; is --channels (or --kind) right?'
            )
        return [np.frombuffer(data, '<f4').reshape(self._channels, side, side)]

    def _value(self, key: str) -> bytes:
        value = self._get(key.encode())
        if value is None:
            raise UserError(f'{self._source}: has no entry {key}: it is incomplete, or not of this layout')
        return value


def _array_from_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


class _Tars:
    """Samples of a webdataset: members of uncompressed tars, found by their headers and read where they are."""

    mirrored = False

    def __init__(self, paths: Sequence[Path], member: str, decode: Callable[[bytes], np.ndarray]) -> None:
        self._files, self._paths, self._member, self._decode = OpenFiles(paths), list(paths), member, decode
        self._keys: list[str] = []
        places, labels = [], []
        progress = Progress(f'reading headers of {len(paths)} tars', None, 'samples')
        for number, path in enumerate(paths):
            for key, (offset, size), label in self._samples(path):
                self._keys.append(key)
                places.append((number, offset, size))
                labels.append(label)
                progress.add()
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.labels = np.array(labels, np.int64)
        self.description = f'webdataset {paths[0].parent.name} ({len(paths)} tars, {member})'

    def name(self, position: int) -> str:
        # keys need only be different within a tar
        return f'{self._paths[self._places[position, 0]].name}/{self._keys[position]}'

    def read(self, position: int) -> list[np.ndarray]:
        """The latents of the sample at this position, ``[C, H, W]`` each."""
        number, offset, size = self._places[position].tolist()
        try:
            return [self._decode(self._files.read(number, offset, size))]
        except UserError:
            raise
        except Exception as error:  # numpy's errors for damaged arrays are of many kinds
            raise UserError(f'{self.name(position)}.{self._member}: {error}') from error

    def _samples(self, path: Path) -> Iterable[tuple[str, tuple[int, int], int]]:
        members: dict[str, dict[str, Any]] = {}
        with Archive(path) as archive:
            for member in archive.members():
                # webdataset: the key ends at the first dot of the file's name, the rest is the kind of the member
                stem, _, kind = member.parts[-1].partition('.')
                key = '/'.join((*member.parts[:-1], stem))
                if kind not in (self._member, 'cls'):
                    raise UserError(
                        f'{path}: member {"/".join(member.parts)!r} does not belong to this layout, whose samples are '
                        f'<key>.{self._member} and <key>.cls'
                    )
                if kind in members.setdefault(key, {}):
                    raise UserError(f'{path}: two members {key}.{kind}')
                place = (member.offset, member.size)
                members[key][kind] = archive.read(*place) if kind == 'cls' else place
        for key, parts in members.items():
            missing = [kind for kind in (self._member, 'cls') if kind not in parts]
            if missing:
                raise UserError(f'{path}: sample {key} has no .{missing[0]}')
            yield key, parts[self._member], _label(parts['cls'], f'{path}, {key}.cls')


class _SafeTensors:
    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise UserError(
                'layout lightningdit needs safetensors, which is not installed: pip install safetensors'
            ) from error
        self._paths, self._open = list(paths), []
        starts, labels, mirrored = [0], [], set()
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
            self._open.append({key: file.get_slice(key) for key in keys - {'labels'}})
            starts.append(starts[-1] + rows['labels'])
        if len(mirrored) > 1:
            raise UserError(f'{paths[0].parent}: some files have latents_flip and some have not')
        self.mirrored = mirrored.pop()
        self.labels, self._starts = np.concatenate(labels), np.array(starts)
        self.description = f'safetensors {paths[0].parent.name} of LightningDiT ({len(paths)} files)'

    def name(self, position: int) -> str:
        file, row = self._place(position)
        return f'{self._paths[file].name}:{row}'

    def read(self, position: int) -> list[np.ndarray]:
        file, row = self._place(position)
        keys = ('latents', 'latents_flip') if self.mirrored else ('latents',)
        return [self._open[file][key][row : row + 1][0].float().numpy() for key in keys]

    def _place(self, position: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, position, side='right')) - 1
        return file, int(position - self._starts[file])


class _Halves:
    """A layout whose second half are the mirror images of its first, in the same order."""

    mirrored = True

    def __init__(self, layout: Layout) -> None:
        half, odd = divmod(len(layout.labels), 2)
        if odd or not np.array_equal(layout.labels[:half], layout.labels[half:]):
            raise UserError(
                f'{layout.description}: the second half of {len(layout.labels)} samples cannot be the mirror images of '
                f'the first: the labels are not the same. Say --mirrors none'
            )
        self._layout, self._half, self.labels = layout, half, layout.labels[:half]
        self.description = layout.description

    def name(self, position: int) -> str:
        return self._layout.name(position)

    def read(self, position: int) -> list[np.ndarray]:
        return [*self._layout.read(position), *self._layout.read(position + self._half)]
