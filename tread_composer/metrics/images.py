"""Sets of images on disk: a folder, one array, an npz as the ADM suite has it, or MDS. All come out as bytes in RGB.

Nothing is resized or cropped: that would move every metric, and belongs to whoever made the images.
Legend: N images of a set, B images of a batch, R side of an image in pixels.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS
from tread_composer.data.manifest import MANIFEST_NAME, Manifest
from tread_composer.io.files import file_hash

__all__ = ['ArrayImages', 'FolderImages', 'ImageSet', 'MDSImages', 'open_images']

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
_MDS_IMAGES = ('png', 'jpeg', 'pil', 'jpeg_array')
_NPZ_ARRAY = 'arr_0'  # the name that numpy gives an array saved without one: ADM's images


class ImageSet:
    """Square images of one size: where they are, N, R; ``kind`` is ``'folder'``, ``'npy'``, ``'npz'`` or ``'mds'``."""

    is_lossy = False
    """Whether there are JPEGs among them: what those have lost moves a distance of features."""

    files: Sequence[str] = ()
    """What holds the images, below ``path``, where that is a folder."""

    def __init__(self, path: Path, kind: str, count: int, resolution: int) -> None:
        self.path, self.kind, self.count, self.resolution = path, kind, count, resolution
        if count < 1:
            raise UserError(f'{path}: holds no images')

    @functools.cached_property
    def hash(self) -> str:
        """``'sha256:...'`` over the content of the files (and their names, where there are several), in any order."""
        if not self.files:
            return file_hash(self.path)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashes = pool.map(lambda name: file_hash(self.path / name).removeprefix('sha256:'), self.files)
            # No name can hold a NUL, so two sets never give the same text
            lines = [f'{name}\0{digest}\n' for name, digest in zip(self.files, hashes, strict=True)]
        return f'sha256:{hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()}'

    def labels(self) -> list[int] | None:
        """What each image was to show, if the set says it."""
        return None

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """One rank's share, uint8 ``[B, 3, R, R]`` a batch of at most ``batch_size``.

        Raises:
            UserError: An image is damaged or of another size.
        """
        # Contiguous shares: an npz is read from one place on
        begin, end = self.count * rank // world, self.count * (rank + 1) // world
        for images_BRR3 in self._arrays(begin, end, batch_size):
            yield torch.from_numpy(np.ascontiguousarray(images_BRR3.transpose(0, 3, 1, 2)))

    def _arrays(self, begin: int, end: int, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(begin, end, batch_size):
            yield self._load(range(start, min(start + batch_size, end)))

    def _load(self, indices: range) -> np.ndarray:
        """Images ``[B, R, R, 3]``."""
        raise NotImplementedError  # each set has this, or an `_arrays` of its own that asks for nothing


class FolderImages(ImageSet):
    """All images below a folder but hidden ones, in the order of their paths; other files are no images.

    Raises:
        UserError: There are none, or the first is damaged or not square.
    """

    def __init__(self, path: Path) -> None:
        names = [file.relative_to(path).as_posix() for file in path.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES]
        self.files = sorted(name for name in names if not any(part.startswith('.') for part in name.split('/')))
        if not self.files:
            raise UserError(f'{path}: holds no images ({", ".join(IMAGE_SUFFIXES)})')
        pixels_RR3 = _pixels(path / self.files[0])
        self.is_lossy = any(name.lower().endswith(('.jpg', '.jpeg')) for name in self.files)
        super().__init__(path, 'folder', len(self.files), _square(pixels_RR3.shape[:2], path / self.files[0]))

    def labels(self) -> list[int] | None:
        """From the names that ``sample`` gives to its files."""
        matches = [re.search(r'_label(\d+)\.png$', name) for name in self.files]
        return [int(match[1]) for match in matches if match] if all(matches) else None

    def _load(self, indices: range) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes outside of Python's lock
            return np.stack(list(pool.map(self._image, self.files[indices.start : indices.stop])))

    def _image(self, name: str) -> np.ndarray:
        pixels, side = _pixels(self.path / name), self.resolution
        if pixels.shape[:2] != (side, side):
            raise UserError(
                f'{self.path / name}: {pixels.shape[1]} x {pixels.shape[0]} pixels, where {self.files[0]} has '
                f'{side} x {side}; a set of images has one size'
            )
        return pixels


class ArrayImages(ImageSet):
    """One array, uint8 ``[N, R, R, 3]`` (or 1 for grey): a ``.npy``, or ``arr_0`` of an npz as ADM's suite has it.

    Read piece by piece: it may be larger than the memory.

    Raises:
        UserError: It is damaged, or another array.
    """

    def __init__(self, path: Path) -> None:
        with _array(path) as (_, shape):
            super().__init__(path, path.suffix.removeprefix('.'), shape[0], _square(shape[1:3], path))

    def labels(self) -> list[int] | None:
        """The array ``arr_1``, where ADM's suite has labels."""
        if self.kind == 'npy':
            return None
        with np.load(self.path, allow_pickle=False) as arrays:
            return arrays['arr_1'].astype(int).tolist() if 'arr_1' in arrays.files else None

    def _arrays(self, begin: int, end: int, batch_size: int) -> Iterator[np.ndarray]:
        with _array(self.path) as (stream, shape):
            size, channels = math.prod(shape[1:]), shape[3]  # 1 for grey
            stream.seek(begin * size, io.SEEK_CUR)  # behind the header
            for start in range(begin, end, batch_size):
                count = min(batch_size, end - start)
                content = stream.read(count * size)
                if len(content) != count * size:
                    raise UserError(f'{self.path}: ends within image {start + len(content) // size}; copy it again')
                yield np.frombuffer(content, np.uint8).reshape(count, *shape[1:]).repeat(3 // channels, axis=3)


class MDSImages(ImageSet):
    """An MDS data set of images: pixels of our own converter, or a column of encoded images (``png``, ``jpeg``).

    Raises:
        UserError: It holds latents, is compressed, or has no column of images.
    """

    def __init__(self, path: Path) -> None:
        from streaming import LocalDataset

        from tread_composer.data.shards import read_index

        shards, self._is_pixels = read_index(path), (path / MANIFEST_NAME).exists()
        self._columns = shards[0].encodings if shards else {}
        described = [name for name in ('index.json', MANIFEST_NAME) if (path / name).exists()]
        self.files = [*described, *(shard.reader.raw_data.basename for shard in shards)]
        images = [name for name, encoding in self._columns.items() if encoding.split(':')[0] in _MDS_IMAGES]
        if any(shard.reader.compression for shard in shards):
            raise UserError(f'{path}: its shards are compressed; write them without compression')
        if any('pkl' in shard.encodings.values() for shard in shards):
            raise UserError(f'{path}: has a column of pickles, which can run code when they are read')
        kind = Manifest.load(path).kind if self._is_pixels else 'pixels'
        if kind != 'pixels':
            raise UserError(f'{path}: holds latents ({kind}), and metrics are of images; give the images themselves')
        if not self._is_pixels and len(images) != 1:
            raise UserError(f'{path}: needs one column of images ({", ".join(_MDS_IMAGES)}), it has {self._columns}')
        self._column = LATENTS if self._is_pixels else images[0]
        self._rows: Any = LocalDataset(str(path))
        self.is_lossy = self._columns[self._column].startswith('jpeg')
        value = self._rows[0][self._column]
        sides = value.shape[1:] if self._is_pixels else _decoded(value).shape[:2]
        super().__init__(path, 'mds', len(self._rows), _square(sides, path))

    def labels(self) -> list[int] | None:
        """The column ``label``, if there is one."""
        return [int(row[LABEL]) for row in self._rows] if LABEL in self._columns else None

    def _load(self, indices: range) -> np.ndarray:
        values, side = [self._rows[index][self._column] for index in indices], self.resolution
        if self._is_pixels:  # of one size, as the index says; together, because torch takes its time for each call
            pixels_BCRR = to_uint8(torch.from_numpy(np.stack(values).astype(np.float32)))
            return _in_colour(pixels_BCRR.permute(0, 2, 3, 1).numpy())
        images = [_decoded(value) for value in values]
        for image in images:
            if image.shape[:2] != (side, side):
                raise UserError(f'{self.path}: an image of {image.shape[1]} x {image.shape[0]} pixels among {side}')
        return np.stack(images)


def _decoded(value: Any) -> np.ndarray:
    return _in_colour(np.atleast_3d(np.asarray(value.convert('RGB') if isinstance(value, Image.Image) else value)))


def _in_colour(pixels: np.ndarray) -> np.ndarray:
    """Grey as three equal channels, which come last."""
    return pixels.repeat(3 // pixels.shape[-1], axis=-1)


def open_images(path: str | Path) -> ImageSet:
    """The set of images at a path, whatever it is.

    Raises:
        UserError: There is nothing that holds images.
    """
    path = Path(path)
    if path.is_file() and path.suffix in ('.npy', '.npz'):
        return ArrayImages(path)
    if path.is_dir():
        return MDSImages(path) if (path / 'index.json').exists() else FolderImages(path)
    problem = 'no such file or folder' if not path.exists() else 'neither an .npz, an .npy nor a folder'
    raise UserError(
        f'{path}: {problem}; give a folder of images, an .npz as ADM has it, an .npy, or an MDS data set of images'
    )


def _pixels(path: Path) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        if not image.mode.startswith(('I', 'F')):  # 32-bit integers and floats: PIL would clip them
            return np.asarray(image.convert('RGB'))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{path}: is no image that can be read: {error}') from error
    raise UserError(f'{path}: mode {image.mode!r} has more than 8 bits a channel')


def _square(size: tuple[int, ...], path: Path) -> int:
    if size[0] != size[1]:
        raise UserError(f'{path}: images of {size[1]} x {size[0]} pixels; they must be square')
    return int(size[0])


@contextlib.contextmanager
def _array(path: Path) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The bytes of an array of images, from behind its header on, and its shape."""
    with contextlib.ExitStack() as stack:
        try:
            if path.suffix == '.npz':
                archive = stack.enter_context(zipfile.ZipFile(path))
                stream = stack.enter_context(archive.open(f'{_NPZ_ARRAY}.npy'))
            else:
                stream = stack.enter_context(path.open('rb'))
            major, _ = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except KeyError:
            raise UserError(f'{path}: has no array {_NPZ_ARRAY!r} of images; it holds {archive.namelist()}') from None
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f'{path}: is no {path.suffix[1:]} that can be read: {error}') from error
        if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.uint8:
            raise UserError(f'{path}: its array is {dtype} {shape}; images are uint8 [N, R, R, 3] (or 1 for grey)')
        if fortran:
            raise UserError(f'{path}: is stored column by column; save it in C order')
        yield stream, shape
