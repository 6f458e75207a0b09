"""The folder that ``sample`` writes: whose it is, the lock, finished parts, and what stands beside the images.

``samples.json`` says what the images are made with. While there is work to do, ``.samples`` holds finished parts: a few
images each, as bytes. An image in one of them is never drawn again. Of all parts become the files that people and other
tools read: PNG, one grid, ADM's npz, MDS.
Legend: N images in all, B images of a part, H x W pixels, C channels.
"""

import contextlib
import io
import itertools
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tread_composer.core.errors import ResumeError, UserError
from tread_composer.io.files import read_json, write_atomically, write_json
from tread_composer.io.locks import locked
from tread_composer.io.picture_grid import class_grid, png_bytes, shown_in_grid
from tread_composer.metrics.drawing import Draws

__all__ = ['PART_SIZE', 'PLACES', 'RECORD', 'WRITERS', 'SamplesFolder', 'write_grid', 'write_pngs']

RECORD = 'samples.json'
PLACES = {'png': 'images', 'npz': 'samples.npz', 'mds': 'mds'}
"""Where the images of a format are."""
PART_SIZE = 16
"""Images that are finished, or after an interruption drawn anew, together. Not the batch, which may change."""

_LOCK, _SCRATCH = '.lock', '.samples'


class SamplesFolder:
    """A folder of ``count`` images; a context manager that holds its lock.

    Raises:
        UserError: On entering: it holds something else, or another process is writing it.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.scratch = path, count, path / _SCRATCH
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> 'SamplesFolder':
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f'--out {self.path}: is a file; give a folder')
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        foreign = [name for name in names if name not in (RECORD, _LOCK, _SCRATCH)]
        if foreign and RECORD not in names:
            raise UserError(
                f'--out {self.path}: holds {", ".join(foreign[:5])}, which no run of sample wrote; choose a folder '
                'that is empty or does not exist yet'
            )
        busy = f'--out {self.path}: is being written by another process ({{holder}}); wait for it, or stop it'
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.path / _LOCK, busy))
        except OSError as error:
            raise UserError(f'--out {self.path}: cannot be written: {error}') from error
        return self

    def __exit__(self, *error: object) -> None:
        (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.close()
        if not any(self.path.iterdir()):
            self.path.rmdir()  # refused before anything was written

    def begin(self, made_with: dict[str, Any], about: dict[str, Any]) -> bool:
        """Claim the folder for these images, or verify that it already belongs to them; whether all is finished.

        ``made_with`` decides the images and their files; ``about`` is what else is worth knowing of them.

        Raises:
            ResumeError: It holds images that were made with something else; lists the differences.
            UserError: It is finished, but something of it is gone.
        """
        path = self.path / RECORD
        if path.exists():
            saved = read_json(path)
            if not isinstance(saved, dict) or 'made_with' not in saved:
                raise UserError(f'{path}: not written by sample; choose another folder')
            if saved['made_with'] != made_with:
                raise ResumeError.from_differences(
                    str(path), saved['made_with'], made_with, 'Sample with the same settings, or choose another --out.'
                )
            if saved['complete']:
                self._check_complete(made_with)
                shutil.rmtree(self.scratch, ignore_errors=True)
                return True
        else:
            write_json(path, {'version': 1, 'complete': False, 'made_with': made_with, **about})
        self.scratch.mkdir(exist_ok=True)
        for unfinished in (*self.scratch.glob('.part-*'), *(self.path / PLACES['png']).glob('.*')):
            unfinished.unlink(missing_ok=True)
        return False

    def mean_taken(self) -> float:
        """The mean number of evaluations of an image."""
        taken = [count for path in self.scratch.glob('part-*.json') for count in read_json(path)]
        return sum(taken) / max(len(taken), 1)

    def finish(self, about: dict[str, Any]) -> None:
        """All is there: say so, with what is known ``about`` it now, and remove the parts."""
        path = self.path / RECORD
        write_json(path, {**read_json(path), **about, 'complete': True})
        shutil.rmtree(self.scratch, ignore_errors=True)

    def undone(self) -> list[int]:
        """Numbers of the parts that are not finished."""
        return [part for part in range(-(-self.count // PART_SIZE)) if not self._part(part).exists()]

    def indices(self, parts: Sequence[int]) -> list[int]:
        """Numbers of the images of parts."""
        starts = (part * PART_SIZE for part in parts)
        return [index for start in starts for index in range(start, min(start + PART_SIZE, self.count))]

    def write_part(self, part: int, images_BHWC: np.ndarray, taken: Sequence[int] = ()) -> None:
        """Keep a part's images, and the evaluations that each of them took where they differ."""
        if taken:  # before the images, which say that the part is there
            write_json(self._part(part).with_suffix('.json'), list(taken))
        content = io.BytesIO()
        np.save(content, images_BHWC, allow_pickle=False)
        write_atomically(self._part(part), content.getvalue())

    def read_part(self, part: int) -> np.ndarray:
        """A finished part's images, uint8 ``[B, H, W, C]``; a ``UserError`` where it is damaged."""
        path = self._part(part)
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f'{path}: damaged ({error}); remove it and run the same command again') from error

    def _part(self, part: int) -> Path:
        return self.scratch / f'part-{part:06d}.npy'

    def _check_complete(self, made_with: dict[str, Any]) -> None:
        places = {**PLACES, 'mds': 'mds/index.json'}
        missing = [places[name] for name in made_with['formats'] if not (self.path / places[name]).exists()]
        if 'png' in made_with['formats'] and not missing:
            num_images = sum(1 for _ in (self.path / places['png']).glob('*.png'))
            if num_images != made_with['num_samples']:
                missing = [f'images of {places["png"]} ({num_images} are there)']  # somebody has deleted or added some
        if missing:
            raise UserError(
                f'{self.path}: was finished, but {", ".join(missing)} is no longer complete; choose another --out, or '
                f'remove the folder to draw all images again'
            )


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
