"""From finished parts to the files that people and other tools read: PNG, one grid, ADM's npz, MDS.

Legend: N images in all, B images of a part, H x W pixels, C channels.
"""

import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tread_composer.io.files import write_atomically
from tread_composer.io.picture_grid import picture_grid, shown_in_grid
from tread_composer.sample.folder import IMAGES, PART_SIZE, SamplesFolder
from tread_composer.sample.request import Draws

__all__ = ['write_grid', 'write_mds', 'write_npz', 'write_pngs']


def write_pngs(folder: SamplesFolder, part: int, images_BHWC: np.ndarray, draws: Draws) -> None:
    """One file for each image of a part; the name says which image, seed and label it is."""
    for offset, image in enumerate(images_BHWC):
        index = part * PART_SIZE + offset
        name = f'{index:06d}_seed{draws.seed(index)}_label{draws.labels[index]}.png'
        content = io.BytesIO()
        picture_of(image).save(content, format='PNG')
        write_atomically(folder.path / IMAGES / name, content.getvalue())


def picture_of(image_HWC: np.ndarray) -> Image.Image:
    """Grey or colour, as it is."""
    return Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)


def write_npz(folder: SamplesFolder, draws: Draws) -> Path:
    """``samples.npz`` in the layout of ADM's evaluation suite, part by part, so that it need not fit into memory.

    ``arr_0``: the images, uint8 ``[N, H, W, 3]`` (its Inception reads colour, so grey is repeated); ``arr_1``: the
    labels, int64 ``[N]``. Stored, not compressed: the suite reads it in pieces.
    """
    path, temporary = folder.path / 'samples.npz', folder.scratch / 'samples.npz'
    count = len(draws.labels)
    height, width = folder.read_part(0).shape[1:3]
    with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open('arr_0.npy', 'w', force_zip64=True) as stream:
            _write_header(stream, (count, height, width, 3), np.dtype(np.uint8))
            for images_BHWC in _parts(folder, count):
                stream.write(np.ascontiguousarray(_coloured(images_BHWC)).tobytes())
        with archive.open('arr_1.npy', 'w', force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.array(draws.labels, dtype=np.int64), allow_pickle=False)
    os.replace(temporary, path)
    return path


def write_mds(folder: SamplesFolder, draws: Draws) -> Path:
    """``mds/``: columns ``image`` (PNG, so the bytes are kept), ``label`` and ``seed``, in order.

    No set of latents as training reads it: those are float16, and have a manifest.
    """
    from streaming import MDSWriter

    path, temporary = folder.path / 'mds', folder.scratch / 'mds'
    shutil.rmtree(temporary, ignore_errors=True)
    with MDSWriter(out=str(temporary), columns={'image': 'png', 'label': 'int', 'seed': 'int'}) as writer:
        for index, image in enumerate(_images(folder, len(draws.labels))):
            row = {'image': picture_of(image), 'label': draws.labels[index], 'seed': draws.seed(index)}
            writer.write(row)
    shutil.rmtree(path, ignore_errors=True)  # of a run that was killed right here
    os.replace(temporary, path)
    return path


def write_grid(folder: SamplesFolder, draws: Draws, class_names: Sequence[str], title: str) -> Path:
    """``grid.png``: the images that ``shown_in_grid`` picks, a row for each class."""
    pictured, rows = shown_in_grid(draws.labels)
    names = ['' if label is None else _name(label, class_names) for label in rows]
    images = np.stack([folder.read_part(index // PART_SIZE)[index % PART_SIZE] for index in pictured])
    tiles = np.broadcast_to(images, (*images.shape[:3], 3))  # grey ones too are drawn in colour
    content = io.BytesIO()
    grid = picture_grid(tiles, title, columns=len(pictured) // len(rows), row_names=names)
    grid.save(content, format='PNG')
    path = folder.path / 'grid.png'
    write_atomically(path, content.getvalue())
    return path


def _name(label: int, class_names: Sequence[str]) -> str:
    if not class_names:
        return str(label)
    return class_names[label] if label < len(class_names) else 'no class'


def _parts(folder: SamplesFolder, count: int) -> Iterator[np.ndarray]:
    return (folder.read_part(part) for part in range(-(-count // PART_SIZE)))


def _images(folder: SamplesFolder, count: int) -> Iterator[np.ndarray]:
    for images_BHWC in _parts(folder, count):
        yield from images_BHWC


def _coloured(images_BHWC: np.ndarray) -> np.ndarray:
    return np.repeat(images_BHWC, 3, axis=3) if images_BHWC.shape[3] == 1 else images_BHWC


def _write_header(stream: object, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
