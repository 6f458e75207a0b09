"""Images that are byte ranges of large files: members of tars, of zips, of the spool that parquet is copied to."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tread_composer.conversion.images import UnreadableImage
from tread_composer.conversion.sources.base import Listed
from tread_composer.core.errors import UserError

__all__ = ['MAX_FILE_BYTES', 'OpenFiles', 'RangeSource', 'refuse_giant']

MAX_FILE_BYTES = 2**29
"""A file above it is no image; reading it would only fill the memory of a worker."""

_MAX_OPEN = 64


def refuse_giant(size: int) -> None:
    """Raise ``UnreadableImage`` for a size that no image has."""
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f'{size:,} bytes; more than {MAX_FILE_BYTES:,} are not read as an image')


class OpenFiles:
    """Files by number, opened when first read in a process, a limited number at once.

    Reads say their offset (``pread``), so that processes which inherited an open file do not disturb each other. Only
    the paths are pickled.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._stamps = [_stamp(os.stat(path)) for path in self.paths]
        self._open: dict[int, BinaryIO] = {}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file ``number`` from ``offset``.

        Raises:
            UserError: The file cannot be read, or is not the one that was indexed.
        """
        try:
            file = self._open.get(number) or self._opened(number)
            pieces = []
            while size > 0:
                piece = os.pread(file.fileno(), size, offset)  # a network file system may return less than asked for
                if not piece:
                    raise UserError(f'{self.paths[number]}: ends before an image that it held. Start again')
                pieces.append(piece)
                offset, size = offset + len(piece), size - len(piece)
            return pieces[0] if len(pieces) == 1 else b''.join(pieces)
        except OSError as error:
            raise UserError(f'{self.paths[number]}: cannot be read: {error}') from error

    def _opened(self, number: int) -> BinaryIO:
        file = open(self.paths[number], 'rb', buffering=0)  # noqa: SIM115  (stays open; closed when it is forgotten)
        if _stamp(os.fstat(file.fileno())) != self._stamps[number]:
            raise UserError(f'{self.paths[number]}: has changed since it was indexed. Start again')
        if len(self._open) >= _MAX_OPEN:
            self._open.pop(next(iter(self._open)))
        self._open[number] = file
        return file

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_open': {}}


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@dataclass(eq=False)
class RangeSource(Listed):
    """Image ``i`` is ``sizes[i]`` bytes of file ``numbers[i]`` from ``offsets[i]``."""

    files: OpenFiles
    numbers: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, position: int) -> bytes:
        """The image file at that position; see ``Source.read``."""
        size = int(self.sizes[position])
        refuse_giant(size)
        return self.files.read(int(self.numbers[position]), int(self.offsets[position]), size)
