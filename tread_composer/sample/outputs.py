"""From finished parts to the files that people and other tools read: PNG, one grid, ADM's npz, MDS.

Legend: N images in all, B images of a part, H x W pixels, C channels.
"""

import itertools
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tread_composer.io.files import write_atomically
from tread_composer.io.picture_grid import class_grid, png_bytes, shown_in_grid
from tread_composer.metrics.drawing import Draws
from tread_composer.sample.folder import PART_SIZE, PLACES, SamplesFolder

__all__ = ['WRITERS', 'write_grid', 'write_pngs']


def write_pngs(folder: SamplesFolder, part: int, images_BHWC: np.ndarray, draws: Draws) -> None:
    """One file for each image of a part; the name says which image, seed and label it is."""
    for index, image in zip(folder.indices([part]), images_BHWC, strict=True):
        name = f'{index:06d}_seed{draws.seed(index)}_label{draws.labels[index]}.png'
        write_atomically(folder.path / PLACES['png'] / name, png_bytes(_picture(image)))


def write_npz(folder: SamplesFolder, draws: Draws) -> Path:
    """``samples.npz`` in the layout of ADM's evaluation suite, part by part, so that it need not fit into memory.

    ``arr_0``: the images, uint8 ``[N, H, W, 3]`` (its Inception reads colour, so grey is repeated); ``arr_1``: the
    labels, int64 ``[N]``. Stored, not compressed: the suite reads it in pieces.
    """
    path, temporary = folder.path / PLACES['npz'], folder.scratch / PLACES['npz']
    height, width = folder.read_part(0).shape[1:3]
    header = {
        'descr': np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        'fortran_order': False,
        'shape': (folder.count, height, width, 3),
    }
    with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open('arr_0.npy', 'w', force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
            for images_BHWC in _parts(folder):
                # Grey as three equal channels
                stream.write(np.broadcast_to(images_BHWC, (*images_BHWC.shape[:3], 3)).tobytes())
        with archive.open('arr_1.npy', 'w', force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.array(draws.labels, dtype=np.int64), allow_pickle=False)
    os.replace(temporary, path)
    return path


def write_mds(folder: SamplesFolder, draws: Draws) -> Path:
    """``mds/``: columns ``image`` (PNG, so the bytes are kept), ``label`` and ``seed``, in order.

    No set of latents as training reads it: those are float16, and have a manifest.
    """
    from streaming import MDSWriter

    path, temporary = folder.path / PLACES['mds'], folder.scratch / PLACES['mds']
    shutil.rmtree(temporary, ignore_errors=True)
    with MDSWriter(out=str(temporary), columns={'image': 'png', 'label': 'int', 'seed': 'int'}) as writer:
        for index, image in enumerate(itertools.chain.from_iterable(_parts(folder))):
            writer.write({'image': _picture(image), 'label': draws.labels[index], 'seed': draws.seed(index)})
    shutil.rmtree(path, ignore_errors=True)  # of a run that was killed right here
    os.replace(temporary, path)
    return path


WRITERS = {'npz': write_npz, 'mds': write_mds}
"""By format, what is written once all parts are finished."""


def write_grid(folder: SamplesFolder, draws: Draws, class_names: Sequence[str], title: str) -> Path:
    """``grid.png``: the images that ``shown_in_grid`` picks, a row for each class."""
    pictured, rows = shown_in_grid(draws.labels)
    tiles_NHWC = np.stack([folder.read_part(index // PART_SIZE)[index % PART_SIZE] for index in pictured])
    path = folder.path / 'grid.png'
    write_atomically(path, png_bytes(class_grid(tiles_NHWC, rows, class_names, title)))
    return path


def _parts(folder: SamplesFolder) -> Iterator[np.ndarray]:
    return (folder.read_part(part) for part in range(-(-folder.count // PART_SIZE)))


def _picture(image_HWC: np.ndarray) -> Image.Image:
    """Grey or colour, as it is."""
    return Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
